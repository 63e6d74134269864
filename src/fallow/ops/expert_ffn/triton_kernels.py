"""The Triton kernels of `expert_ffn`; imported only where Triton is.

All GEMMs are grouped: rows are sorted by expert and every expert starts at a multiple of BM rows (order.py), so a block
of rows has one expert, and which one is read from a table instead of being searched for. The gather is part of the
GEMM's loads: rows of x and dy are read through `token`. The obvious alternative, a gathered copy of x, is K times x
written and read again. `down` turns
preactivations into the hidden layer while it loads them; `hidden_grad` is dh and everything elementwise behind it;
`input_grad` sums gate and up in one accumulator; `weight_grad` is one tile of one expert's gradient, over the expert's
rows. Sums are fp32 and in a fixed order.

Cost: 18·T·K·D·C FLOPs forwards and backwards with a gate; [T·K, D] written and read once each way.
"""

# pyright: reportArgumentType=false
# (Triton annotates compile-time arguments as `tl.constexpr` and takes plain values for them.)

# triton types a jitted function as one that never returns, so a helper's result looks wrong to pyright
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import os

import triton
import triton.language as tl

from fallow.ops.subset_ffn.triton_kernels import hidden_and_grads, value_and_slope

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BM = 16 if INTERPRETED else 64
"""Rows per program, and what every expert's first row is a multiple of."""


def _configs(names: tuple[str, ...], *shapes: tuple[int, ...]) -> list[triton.Config]:
    """Each shape is the named sizes, then warps and stages."""
    return [
        triton.Config(dict(zip(names, s[:-2], strict=True)), num_warps=s[-2], num_stages=s[-1])
        for s in ([(*(16,) * len(names), 1, 1)] if INTERPRETED else shapes)
    ]


_GEMM = _configs(("BN", "BK"), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 4), (128, 32, 4, 4), (256, 32, 8, 3))
_TWO = _configs(("BN", "BK"), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3), (64, 32, 4, 4))
_GRAD = _configs(("BI", "BJ", "BR"), (128, 128, 32, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (128, 64, 64, 8, 3))


@triton.jit
def rows_of_program(expert_of, start, count, BM: tl.constexpr):
    """(expert, rows, which of them are tokens) of this program's block of rows; expert -1 where there are none."""
    block = tl.program_id(0)
    e = tl.load(expert_of + block)
    row = (block * BM + tl.arange(0, BM)).to(tl.int64)
    first = tl.load(start + tl.maximum(e, 0))
    n = tl.load(count + tl.maximum(e, 0))
    return e, row, row - first < n


@triton.autotune(configs=_TWO, key=["D", "C"])
@triton.jit
def inner_kernel(
    x, token, expert_of, start, count, w_gate, w_up, b_gate, b_up, gate, up, D, C,
    gate_f, gate_d, up_f, up_d,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """gate[r], up[r] = x[token[r]] times the rows of w_gate and w_up that belong to the row's expert, plus bias."""
    e, row, in_row = rows_of_program(expert_of, start, count, BM)
    if e >= 0:
        c = tl.program_id(1) * BN + tl.arange(0, BN)
        in_c = c < C
        f = (e * C + c).to(tl.int64)
        t = tl.load(token + row, mask=in_row, other=0)
        sum_gate = tl.zeros((BM, BN), dtype=tl.float32)
        sum_up = tl.zeros((BM, BN), dtype=tl.float32)
        for done in range(0, D, BK):
            k = done + tl.arange(0, BK)
            in_k = k < D
            x_tile = tl.load(x + t[:, None] * D + k[None, :], mask=in_row[:, None] & in_k[None, :], other=0.0)
            inside = in_k[:, None] & in_c[None, :]
            w_tile = tl.load(w_up + k[:, None] * up_d + f[None, :] * up_f, mask=inside, other=0.0)
            sum_up = tl.dot(x_tile, w_tile, sum_up, input_precision=PRECISION)
            if GATED:
                w_tile = tl.load(w_gate + k[:, None] * gate_d + f[None, :] * gate_f, mask=inside, other=0.0)
                sum_gate = tl.dot(x_tile, w_tile, sum_gate, input_precision=PRECISION)
        at = row[:, None] * C + c[None, :]
        to = in_row[:, None] & in_c[None, :]
        if b_up is not None:
            sum_up += tl.load(b_up + f, mask=in_c, other=0.0).to(tl.float32)[None, :]
        tl.store(up + at, sum_up.to(up.dtype.element_ty), mask=to)
        if GATED:
            if b_gate is not None:
                sum_gate += tl.load(b_gate + f, mask=in_c, other=0.0).to(tl.float32)[None, :]
            tl.store(gate + at, sum_gate.to(gate.dtype.element_ty), mask=to)


@triton.autotune(configs=_GEMM, key=["D", "C"])
@triton.jit
def down_kernel(
    gate, up, expert_of, start, count, w_down, out, D, C, down_d, down_f,
    GATED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[r] = hidden layer of row r times the expert's columns of w_down."""
    e, row, in_row = rows_of_program(expert_of, start, count, BM)
    if e >= 0:
        d = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
        in_d = d < D
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for done in range(0, C, BK):
            c = done + tl.arange(0, BK)
            in_c = c < C
            at = row[:, None] * C + c[None, :]
            inside = in_row[:, None] & in_c[None, :]
            pre = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                gate_tile = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
                h = value_and_slope(gate_tile, ACT)[0] * pre
            else:
                h = value_and_slope(pre, ACT)[0]
            f = (e * C + c).to(tl.int64)
            w_tile = tl.load(
                w_down + d[None, :] * down_d + f[:, None] * down_f, mask=in_c[:, None] & in_d[None, :], other=0.0
            )
            acc = tl.dot(h.to(w_tile.dtype), w_tile, acc, input_precision=PRECISION)
        tl.store(
            out + row[:, None] * D + d[None, :],
            acc.to(out.dtype.element_ty),
            mask=in_row[:, None] & in_d[None, :],
        )


@triton.jit
def combine_kernel(rows, slot, bias, out, D, K, BLOCK: tl.constexpr):
    """out[t] = bias + the sum over k of rows[slot[t, k]]."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_d = d < D
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    if bias is not None:
        acc += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    for k in range(0, K):
        r = tl.load(slot + t * K + k)
        acc += tl.load(rows + r * D + d, mask=in_d, other=0.0).to(tl.float32)
    tl.store(out + t * D + d, acc.to(out.dtype.element_ty), mask=in_d)


@triton.autotune(configs=_GEMM, key=["D", "C"])
@triton.jit
def hidden_grad_kernel(
    dy, token, expert_of, start, count, w_down, gate, up, h, dgate, dup, dot, D, C, n_rows, down_d, down_f,
    GATED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dh = dy[token[r]] times the expert's columns of w_down; from it h, dgate, dup, and dot[j, r], the sum of dh·h
    over the channels of column block j."""
    e, row, in_row = rows_of_program(expert_of, start, count, BM)
    if e >= 0:
        c = tl.program_id(1) * BN + tl.arange(0, BN)
        in_c = c < C
        f = (e * C + c).to(tl.int64)
        t = tl.load(token + row, mask=in_row, other=0)
        dh = tl.zeros((BM, BN), dtype=tl.float32)
        for done in range(0, D, BK):
            k = (done + tl.arange(0, BK)).to(tl.int64)
            in_k = k < D
            dy_tile = tl.load(dy + t[:, None] * D + k[None, :], mask=in_row[:, None] & in_k[None, :], other=0.0)
            w_tile = tl.load(
                w_down + k[:, None] * down_d + f[None, :] * down_f, mask=in_k[:, None] & in_c[None, :], other=0.0
            )
            dh = tl.dot(dy_tile, w_tile, dh, input_precision=PRECISION)
        at = row[:, None] * C + c[None, :]
        inside = in_row[:, None] & in_c[None, :]
        pre = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        pre_gate = pre
        if GATED:
            pre_gate = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        hidden, d_gate, d_up = hidden_and_grads(pre_gate, pre, dh, GATED, ACT)
        tl.store(h + at, hidden.to(h.dtype.element_ty), mask=inside)
        tl.store(dup + at, d_up.to(dup.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(dgate + at, d_gate.to(dgate.dtype.element_ty), mask=inside)
        product = tl.where(inside, dh * hidden, 0.0)
        tl.store(dot + tl.program_id(1) * n_rows + row, tl.sum(product, 1), mask=in_row)


@triton.autotune(configs=_GEMM, key=["D", "C"])
@triton.jit
def input_grad_kernel(
    dgate, dup, expert_of, start, count, w_gate, w_up, out, D, C, gate_f, gate_d, up_f, up_d,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[r] = dgate[r] times the expert's rows of w_gate, plus dup[r] times those of w_up."""
    e, row, in_row = rows_of_program(expert_of, start, count, BM)
    if e >= 0:
        d = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
        in_d = d < D
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for done in range(0, C, BK):
            c = done + tl.arange(0, BK)
            in_c = c < C
            at = row[:, None] * C + c[None, :]
            left = in_row[:, None] & in_c[None, :]
            right = in_c[:, None] & in_d[None, :]
            f = (e * C + c).to(tl.int64)
            w_tile = tl.load(w_up + f[:, None] * up_f + d[None, :] * up_d, mask=right, other=0.0)
            acc = tl.dot(tl.load(dup + at, mask=left, other=0.0), w_tile, acc, input_precision=PRECISION)
            if GATED:
                w_tile = tl.load(w_gate + f[:, None] * gate_f + d[None, :] * gate_d, mask=right, other=0.0)
                acc = tl.dot(tl.load(dgate + at, mask=left, other=0.0), w_tile, acc, input_precision=PRECISION)
        tl.store(
            out + row[:, None] * D + d[None, :],
            acc.to(out.dtype.element_ty),
            mask=in_row[:, None] & in_d[None, :],
        )


@triton.autotune(configs=_GRAD, key=["D", "C"])
@triton.jit
def weight_grad_kernel(
    z, source, token, start, count, out, D, C, out_f, out_d,
    PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[e·C + i, j] = the sum over the rows of expert e of z[r, i] · source[token[r], j]; zero without rows."""
    e = tl.program_id(1)
    n_j_blocks = tl.cdiv(D, BJ)
    i = (tl.program_id(0) // n_j_blocks) * BI + tl.arange(0, BI)
    j = ((tl.program_id(0) % n_j_blocks) * BJ + tl.arange(0, BJ)).to(tl.int64)
    in_i = i < C
    in_j = j < D
    first = tl.load(start + e)
    n = tl.load(count + e)
    acc = tl.zeros((BI, BJ), dtype=tl.float32)
    for done in range(0, n, BR):
        r = done + tl.arange(0, BR)
        in_r = r < n
        row = (first + r).to(tl.int64)
        t = tl.load(token + row, mask=in_r, other=0)
        z_tile = tl.load(z + row[:, None] * C + i[None, :], mask=in_r[:, None] & in_i[None, :], other=0.0)
        right = tl.load(source + t[:, None] * D + j[None, :], mask=in_r[:, None] & in_j[None, :], other=0.0)
        acc = tl.dot(tl.trans(z_tile), right, acc, input_precision=PRECISION)
    f = (e * C + i).to(tl.int64)
    to = out + f[:, None] * out_f + j[None, :] * out_d
    tl.store(to, acc.to(out.dtype.element_ty), mask=in_i[:, None] & in_j[None, :])
