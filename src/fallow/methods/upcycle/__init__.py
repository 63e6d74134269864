"""Upcycle: a dense model that computes a quarter of its FFN per token (Huang et al., arXiv 2606.10722)."""

from fallow.method import register
from fallow.methods.upcycle.config import Upcycle
from fallow.methods.upcycle.method import UpcycleMethod

register(Upcycle, UpcycleMethod)

__all__ = ["Upcycle", "UpcycleMethod"]
