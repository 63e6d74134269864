"""What all Triton backends ask first: whether Triton runs here at all, and whether it can run on a tensor."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for; kernels then take tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> tuple[bool, str]:
    """Whether Triton can run here, and why (not)."""
    if find_spec("triton") is None:
        return False, "the triton package is not installed; pip install 'fallow[gpu]'"
    if interpreted():
        return True, "Triton's interpreter (TRITON_INTERPRET=1): correct, very slow"
    if not torch.cuda.is_available():
        return False, "no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU for tests"
    return True, f"Triton on {torch.cuda.get_device_name()}"


def runs_on(x: Tensor) -> tuple[bool, str]:
    """Whether a kernel can take `x`, and why (not)."""
    if hasattr(x, "placements"):
        return False, "x is a DTensor; kernels see local tensors only"
    if x.device.type != "cuda" and not interpreted():
        return False, f"x is on {x.device}; kernels run on a CUDA device"
    return True, ""
