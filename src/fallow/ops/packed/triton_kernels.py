"""The Triton kernels of packed sparse weights; imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl

# pyright types a call of a jit function as NoReturn, and here its result is unpacked: hence the two ignores below.


@triton.jit
def _places(bitmap, row, first, n_in, n_bytes, BLOCK: tl.constexpr):
    """Columns of one block of a row: their numbers, which are inside the row, which are active, and the active ones'
    ranks in the block."""
    column = first + tl.arange(0, BLOCK)
    inside = column < n_in
    byte = tl.load(bitmap + row * n_bytes + column // 8, mask=inside, other=0).to(tl.int32)
    on = (byte >> (column % 8)) & 1
    return column, inside, on, tl.cumsum(on, 0) - on


@triton.jit
def expand_rows(values, bitmap, start, out, n_in, n_bytes, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(start + row)
    for first in range(0, n_in, BLOCK):
        column, inside, on, rank = _places(bitmap, row, first, n_in, n_bytes, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
        found = tl.load(values + position + rank, mask=inside & (on == 1), other=0)
        tl.store(out + row * n_in + column, found, mask=inside)
        position += tl.sum(on, 0)


@triton.jit
def compress_rows(dense, bitmap, start, out, n_in, n_bytes, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(start + row)
    for first in range(0, n_in, BLOCK):
        column, inside, on, rank = _places(bitmap, row, first, n_in, n_bytes, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
        active = inside & (on == 1)
        found = tl.load(dense + row * n_in + column, mask=active, other=0)
        tl.store(out + position + rank, found, mask=active)
        position += tl.sum(on, 0)
