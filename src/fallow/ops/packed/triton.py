"""Packed sparse weights in Triton: one program per row, positions by a prefix popcount.

    position of column c = start[row] + (active bits before c)

A program walks its row's columns in blocks and carries the count along; within a block the positions are a cumulative
sum of the bits. Bound by memory, as on the CPU. Tested without a GPU under Triton's interpreter; benchmarks/gpu_all.py
checks and times it on one.
"""

from __future__ import annotations

from torch import Tensor

from fallow.ops.gpu import available, runs_on

__all__ = ["available", "compress", "expand", "name", "usable"]

name = "triton"

_BLOCK = 1024


def usable(x: Tensor) -> tuple[bool, str]:
    """Whether tensors like `x` can be served here, and why (not)."""
    if not (found := runs_on(x))[0]:
        return found
    return True, "one pass, positions by prefix popcount"


def expand(values: Tensor, bitmap_OB: Tensor, start_O1: Tensor, out_OI: Tensor) -> None:
    """As `naive.expand`."""
    from fallow.ops.packed.triton_kernels import expand_rows

    n_out, n_in = out_OI.shape
    expand_rows[(n_out,)](values.contiguous(), bitmap_OB, start_O1, out_OI, n_in, bitmap_OB.shape[1], BLOCK=_BLOCK)  # type: ignore[arg-type]


def compress(dense_OI: Tensor, bitmap_OB: Tensor, start_O1: Tensor, out: Tensor) -> None:
    """As `naive.compress`."""
    from fallow.ops.packed.triton_kernels import compress_rows

    n_out, n_in = dense_OI.shape
    compress_rows[(n_out,)](dense_OI.contiguous(), bitmap_OB, start_O1, out, n_in, bitmap_OB.shape[1], BLOCK=_BLOCK)  # type: ignore[arg-type]
