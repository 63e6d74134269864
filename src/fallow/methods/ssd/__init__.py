"""SSD: train dense when it must, as experts when it can (Zhang et al., ICML 2024, arXiv 2410.03440)."""

from fallow.method import register
from fallow.methods.ssd.config import SSD
from fallow.methods.ssd.method import SSDMethod

register(SSD, SSDMethod)

__all__ = ["SSD", "SSDMethod"]
