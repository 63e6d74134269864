"""Packed sparse weights through native/packed.cpp: AVX-512 expand and compress instructions, AVX2 shuffles, or C++.

Bound by memory: a 2048×5461 bf16 layer at density 0.25 expands in about the time that its 22 MB take to be written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops import native

name = "native"

_ANY = -1


def available() -> tuple[bool, str]:
    """Whether the compiled kernels are there, and why not."""
    return native.available()


def usable(x: Tensor) -> tuple[bool, str]:
    """Whether tensors like `x` can be served here, and why not."""
    if x.device.type != "cpu":
        return False, f"tensors on {x.device}"
    if x.element_size() not in (1, 2, 4):
        return False, f"{x.dtype} has {x.element_size()} bytes; served are 1, 2 and 4"
    return True, ""


def expand(values: Tensor, bitmap_OB: Tensor, start_O1: Tensor, out_OI: Tensor, *, level: int = _ANY) -> None:
    """As `naive.expand`. `level` 0, 1, 2 asks for plain C++, AVX2 or AVX-512, as far as this CPU has it."""
    values = values.contiguous()
    native.library().fallow_expand(
        *(t.data_ptr() for t in (values, bitmap_OB, start_O1, out_OI)),
        *out_OI.shape,
        values.element_size(),
        torch.get_num_threads(),
        level,
    )


def compress(dense_OI: Tensor, bitmap_OB: Tensor, start_O1: Tensor, out: Tensor, *, level: int = _ANY) -> None:
    """As `naive.compress`; `level` as in `expand`."""
    dense_OI = dense_OI.contiguous()
    native.library().fallow_compress(
        *(t.data_ptr() for t in (dense_OI, bitmap_OB, start_O1, out)),
        *dense_OI.shape,
        out.element_size(),
        torch.get_num_threads(),
        level,
    )
