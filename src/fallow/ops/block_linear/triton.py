"""`block_linear` on GPUs: the tiles of a grid row, end to end, are one GEMM (triton_kernels.py); dead ones are unread.

Forward walks the tiles of each row, the input gradient those of each column, the gradient of a tile all tokens.
Sums are fp32, in a fixed order, and rounded once. Nothing is copied and nothing but x and the values is saved. The
obvious alternative, torch.bmm on gathered copies of x and a scatter-add, moves x once per tile through memory. Tested
without a GPU: value and gradients under Triton's interpreter (TRITON_INTERPRET=1) in fp32 and fp16 (its dot has no
bf16), and every kernel compiles for sm_90. Not yet run on a GPU: benchmarks/gpu_all.py checks it there, then times it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops.block_linear.tiles import Tiles
from fallow.ops.gpu import available, runs_on

__all__ = ["DTYPES", "available", "backward", "forward", "name", "usable"]

name = "triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def usable(x: Tensor, tiles: Tiles) -> tuple[bool, str]:
    """Whether `x` can be served here, and why (not)."""
    if not (found := runs_on(x))[0]:
        return found
    if tiles.rows_N.device != x.device:
        return False, f"x is on {x.device}, tiles on {tiles.rows_N.device}"
    if x.dtype not in DTYPES:
        return False, f"x is {x.dtype}; kernels know bfloat16, float16 and float32"
    return True, "one GEMM per row of tiles"


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Every buffer a kernel is to fill entirely comes from here, so that tests can poison it."""
    return like.new_empty(shape)


def forward(x_TI: Tensor, values_Nbb: Tensor, bias_O: Tensor | None, index: list[Tensor], size: list[int]) -> Tensor:
    """y [T, out]. `index`: rows_N to col_order of `Tiles`; `size`: out, in_, block."""
    from fallow.ops.block_linear.triton_kernels import lines

    _, cols_N, row_start, _, _ = index
    y_TO = _empty(x_TI, x_TI.shape[0], size[0])
    x_TI, values_Nbb = x_TI.contiguous(), values_Nbb.contiguous()
    bias_O = None if bias_O is None else bias_O.contiguous()
    with torch.cuda.device_of(x_TI):
        lines(x_TI, values_Nbb, bias_O, row_start, None, cols_N, y_TO, transposed=False)
    return y_TO


def backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    values_Nbb: Tensor,
    index: list[Tensor],
    size: list[int],
    need_dx: bool,
    need_dvalues: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [T, in_] and dvalues [N, b, b], each where it is asked for; arguments as in `forward`."""
    from fallow.ops.block_linear.triton_kernels import lines, tile_gradients

    rows_N, cols_N, _, col_start, col_order = index
    dy_TO, x_TI, values_Nbb = dy_TO.contiguous(), x_TI.contiguous(), values_Nbb.contiguous()
    dx_TI = dvalues_Nbb = None
    with torch.cuda.device_of(x_TI):
        if need_dx:
            dx_TI = _empty(x_TI, *x_TI.shape)
            lines(dy_TO, values_Nbb, None, col_start, col_order, rows_N, dx_TI, transposed=True)
        if need_dvalues:
            dvalues_Nbb = _empty(values_Nbb, *values_Nbb.shape)
            tile_gradients(dy_TO, x_TI, rows_N, cols_N, dvalues_Nbb)
    return dx_TI, dvalues_Nbb
