"""The Triton kernels of `block_linear`; imported only where Triton is.

`lines` is forward and the input gradient alike: a line of the grid (a row of tiles; for dx a column) is one GEMM whose
inner dimension is the line's active tiles laid end to end. The inner loop takes `BK` of it at a time, whatever the side
b of a tile is: a part of one tile, or several small ones. `tile_gradients` is one program per active tile (or part of
128×128 of a larger one) that walks the tokens. All sums are fp32. What a tile holds beyond the weight's edge counts as
zero. The obvious alternative, one launch for all tiles with atomic adds, would write y once per tile and sum in no
fixed order.

Cost per direction: 2·T·N·b² FLOPs. `lines` reads a tile T/BM times, and b columns of x for each tile, so small tiles
are bound by reading x. Program shapes are autotuned at first use per width, b and dtype (T excluded).
"""

# pyright: reportArgumentType=false
# (Triton annotates compile-time arguments as `tl.constexpr` and takes plain values for them.)

# triton types a jitted function as one that never returns, so a helper's result looks wrong to pyright
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDEST = 128  # columns of a program's accumulator; larger tiles are done in parts


def _configs(names: tuple[str, ...], *shapes: tuple[int, ...]) -> list[triton.Config]:
    """Each shape is the named sizes, then warps and stages."""
    return [
        triton.Config(dict(zip(names, s[:-2], strict=True)), num_warps=s[-2], num_stages=s[-1])
        for s in ([(*(16,) * len(names), 1, 1)] if INTERPRETED else shapes)
    ]


@triton.autotune(
    configs=_configs(("BM", "BK"), (128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 4, 4), (64, 64, 4, 4), (256, 32, 8, 3)),
    key=["n_in", "n_out", "B"],
)
@triton.jit
def lines_kernel(
    x, values, bias, start, order, other, y, n_tokens, n_in, n_out, n_lines, n_parts,
    B: tl.constexpr, W_OUT: tl.constexpr, W_IN: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[t, line·B + o] = bias[line·B + o] + Σ over tiles n of the line and over j of
    x[t, other[n]·B + j] · values[n][o·W_OUT + j·W_IN].

    The tiles of line l are order[start[l]] to order[start[l + 1] - 1], or those numbers themselves without an order.
    """
    pid, across = tl.program_id(0), n_lines * n_parts
    # in groups of 8 token blocks, so that neighbours share tiles and tokens in L2
    m, part = tl.swizzle2d(pid // across, pid % across, tl.cdiv(n_tokens, BM), across, 8)
    line = part // n_parts
    t = (m * BM + tl.arange(0, BM)).to(tl.int64)
    o = (part % n_parts) * BN + tl.arange(0, BN)  # within the tile
    in_t = t < n_tokens
    in_o = (o < B) & (line * B + o < n_out)
    first = tl.load(start + line)
    length = (tl.load(start + line + 1) - first) * B
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for done in range(0, length, BK):
        k = done + tl.arange(0, BK)
        in_k = k < length
        tile = first + k // B
        if order is not None:
            tile = tl.load(order + tile, mask=in_k, other=0)
        j = k % B
        column = tl.load(other + tile, mask=in_k, other=0) * B + j
        in_k = in_k & (column < n_in)
        x_tile = tl.load(x + t[:, None] * n_in + column[None, :], mask=in_t[:, None] & in_k[None, :], other=0.0)
        at_w = tile.to(tl.int64)[:, None] * (B * B) + j[:, None] * W_IN + o[None, :] * W_OUT
        w_tile = tl.load(values + at_w, mask=in_k[:, None] & in_o[None, :], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    column = line * B + o
    if bias is not None:
        acc += tl.load(bias + column, mask=in_o, other=0.0).to(tl.float32)[None, :]
    to = y + t[:, None] * n_out + column[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=in_t[:, None] & in_o[None, :])


@triton.autotune(
    configs=_configs(("BR",), (64, 4, 3), (64, 8, 3), (32, 4, 4), (128, 4, 2)),
    key=["n_in", "n_out", "B"],
)
@triton.jit
def tile_gradients_kernel(
    dy, x, rows, cols, out, n_tokens, n_in, n_out, n_parts,
    B: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[n, i, j] = Σ_t dy[t, rows[n]·B + i]·x[t, cols[n]·B + j]; zero outside the weight."""
    tile = tl.program_id(0)
    i = (tl.program_id(1) // n_parts) * BN + tl.arange(0, BN)
    j = (tl.program_id(1) % n_parts) * BN + tl.arange(0, BN)
    left = tl.load(rows + tile) * B + i
    right = tl.load(cols + tile) * B + j
    in_i = (i < B) & (left < n_out)
    in_j = (j < B) & (right < n_in)
    acc = tl.zeros((BN, BN), dtype=tl.float32)
    for done in range(0, n_tokens, BR):
        t = (done + tl.arange(0, BR)).to(tl.int64)
        in_t = t < n_tokens
        dy_tile = tl.load(dy + t[:, None] * n_out + left[None, :], mask=in_t[:, None] & in_i[None, :], other=0.0)
        x_tile = tl.load(x + t[:, None] * n_in + right[None, :], mask=in_t[:, None] & in_j[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy_tile), x_tile, acc, input_precision=PRECISION)
    to = out + tile.to(tl.int64) * (B * B) + i[:, None] * B + j[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(i < B)[:, None] & (j < B)[None, :])


def _precision() -> str:
    """fp32 products as torch.mm is set to do them."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _parts(block: int) -> tuple[int, int]:
    """(columns per program, programs per tile side)."""
    width = max(16, min(WIDEST, 1 << (block - 1).bit_length()))
    return width, -(-block // width)


def lines(
    x: Tensor, values: Tensor, bias: Tensor | None, start: Tensor, order: Tensor | None, other: Tensor, y: Tensor, *,
    transposed: bool,
) -> None:  # fmt: skip
    """Fill y [T, O] from x [T, I] and tiles [N, b, b].

    Args:
        start: int32 [lines + 1], `row_start`; of the input gradient `col_start`.
        order: int32 [N], the tiles by column; None where they are in order already (by row).
        other: int32 [N], where in x a tile reads: `cols`; of the input gradient `rows`.
        transposed: multiply by the tiles themselves rather than by their transposes (the input gradient).
    """
    (T, n_in), n_out, b = x.shape, y.shape[1], values.shape[-1]
    if T == 0:
        return
    width, parts = _parts(b)
    out_stride, in_stride = (1, b) if transposed else (b, 1)
    n_lines = start.shape[0] - 1
    lines_kernel[lambda meta: (triton.cdiv(T, meta["BM"]) * n_lines * parts,)](
        x, values, bias, start, order, other, y, T, n_in, n_out, n_lines, parts,
        B=b, W_OUT=out_stride, W_IN=in_stride, PRECISION=_precision(), BN=width,
    )  # fmt: skip


def tile_gradients(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor, out: Tensor) -> None:
    """Fill out [N, b, b] from dy [T, O] and x [T, I]."""
    N, b = out.shape[0], out.shape[-1]
    if N == 0:
        return
    width, parts = _parts(b)
    tile_gradients_kernel[(N, parts * parts)](
        dy, x, rows, cols, out, x.shape[0], x.shape[1], dy.shape[1], parts, B=b, PRECISION=_precision(), BN=width
    )  # fmt: skip
