"""SMET, sparse memory-efficient training: pre-train with a share of the weights alive, and a topology that moves."""

from fallow.method import register
from fallow.methods.smet.config import SMET as SMET
from fallow.methods.smet.method import SMETMethod as SMETMethod

register(SMET, SMETMethod)
