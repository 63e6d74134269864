"""Memory-bound Triton kernels of `subset_ffn`: take and put rows or columns by index, and the activation, both ways.

They are what torch.mm leaves over: `take` gathers kept rows or columns into a contiguous operand, `put` writes a
gradient over kept channels into the full-size one and zeroes the rest in the same pass (memset and scatter would write
the kept part twice), and the activation kernels do bias, activation, gate product and, backward, both derivatives in
one pass. Cost: each operand read once and written once; columns taken from a row-major matrix read it whole, because
at a density of one half every 32-byte sector holds a kept element.
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


@triton.jit
def take_kernel(
    src, idx, out, n_rows, n_cols, src_r, src_c, out_r, out_c, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """out[i, j] = src[idx[i], j] (DIM 0) or src[i, idx[j]] (DIM 1)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    src_row = row
    src_col = col
    if DIM == 0:
        src_row = tl.load(idx + row, mask=row < n_rows, other=0)
    else:
        src_col = tl.load(idx + col, mask=col < n_cols, other=0)
    value = tl.load(src + src_row[:, None] * src_r + src_col[None, :] * src_c, mask=inside, other=0.0)
    tl.store(out + row[:, None] * out_r + col[None, :] * out_c, value, mask=inside)


@triton.jit
def put_kernel(
    src, at, out, n_rows, n_cols, src_r, src_c, out_r, out_c, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """out[i, j] = src[at[i], j] (DIM 0) or src[i, at[j]] (DIM 1), and 0 where `at` is negative."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    src_row = row
    src_col = col
    if DIM == 0:
        src_row = tl.load(at + row, mask=row < n_rows, other=-1)
        kept = inside & (src_row >= 0)[:, None]
    else:
        src_col = tl.load(at + col, mask=col < n_cols, other=-1)
        kept = inside & (src_col >= 0)[None, :]
    value = tl.load(src + src_row[:, None] * src_r + src_col[None, :] * src_c, mask=kept, other=0.0)
    tl.store(out + row[:, None] * out_r + col[None, :] * out_c, value, mask=inside)


@triton.jit
def value_and_slope(a, ACT: tl.constexpr):
    """(act(a), act'(a)) in fp32. tanh-GELU is a·sigmoid(2z), which needs no tanh."""
    value = a
    slope = a
    if ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-a))
        value = a * s
        slope = s * (1.0 + a * (1.0 - s))
    elif ACT == "relu":
        value = tl.where(a < 0, 0.0, a)
        slope = tl.where(a > 0, 1.0, 0.0)
    elif ACT == "relu2":
        value = tl.where(a < 0, 0.0, a * a)
        slope = tl.where(a > 0, 2.0 * a, 0.0)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
        value = a * cdf
        slope = cdf + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    else:
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (a + 0.044715 * a * a * a)))
        value = a * s
        slope = s + a * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * a * a)
    return value, slope


@triton.jit
def hidden_and_grads(gate, up, dh, GATED: tl.constexpr, ACT: tl.constexpr):
    """(h, d_gate, d_up) of h = act(gate)·up, or of h = act(up) without a gate (d_gate is then unused)."""
    if GATED:
        value, slope = value_and_slope(gate, ACT)
        h = value * up
        d_gate = dh * up * slope
        d_up = dh * value
    else:
        h, slope = value_and_slope(up, ACT)
        d_gate = dh
        d_up = dh * slope
    return h, d_gate, d_up


@triton.jit
def plus_bias(pre, bias, channel, inside):
    """`pre` in fp32, plus bias[channel] where there is one."""
    value = pre.to(tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def act_kernel(
    gate, up, h, pre, b_gate, b_up, idx, at, n_tokens, n_channels, n_kept, in_t, h_t, pre_t,
    ACT: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """h = act(gate + b_gate)·(up + b_up). `idx`: channel of each column; `at`: where in `pre` a column is saved."""
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    n = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    inside_n = n < n_channels
    inside = (t < n_tokens)[:, None] & inside_n[None, :]
    channel = n
    if idx is not None:
        channel = tl.load(idx + n, mask=inside_n, other=0)
    at_in = t[:, None] * in_t + n[None, :]
    raw_up = tl.load(up + at_in, mask=inside, other=0.0)
    u = plus_bias(raw_up, b_up, channel, inside_n)
    raw_gate = raw_up
    if gate is not None:
        raw_gate = tl.load(gate + at_in, mask=inside, other=0.0)
        g = plus_bias(raw_gate, b_gate, channel, inside_n)
        value, _ = value_and_slope(g, ACT)
        value = value * u
    else:
        value, _ = value_and_slope(u, ACT)
    if at is not None:
        slot = tl.load(at + n, mask=inside_n, other=-1)
        kept = inside & (slot >= 0)[None, :]
        to = pre + t[:, None] * pre_t + slot[None, :]
        if gate is not None:
            tl.store(to, raw_gate, mask=kept)
            tl.store(to + n_kept, raw_up, mask=kept)
        else:
            tl.store(to, raw_up, mask=kept)
    tl.store(h + t[:, None] * h_t + n[None, :], value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def act_backward_kernel(
    pre, dh, dpre, b_gate, b_up, idx, n_tokens, n_kept, pre_t, dh_t,
    GATED: tl.constexpr, ACT: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Reads preactivations and dh; writes dpre (laid out as pre) and puts h in dh's place."""
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    n = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    inside_n = n < n_kept
    inside = (t < n_tokens)[:, None] & inside_n[None, :]
    channel = n
    if idx is not None:
        channel = tl.load(idx + n, mask=inside_n, other=0)
    first = t[:, None] * pre_t + n[None, :]
    grad = tl.load(dh + t[:, None] * dh_t + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATED:
        g = plus_bias(tl.load(pre + first, mask=inside, other=0.0), b_gate, channel, inside_n)
        u = plus_bias(tl.load(pre + first + n_kept, mask=inside, other=0.0), b_up, channel, inside_n)
        h, d_gate, d_up = hidden_and_grads(g, u, grad, True, ACT)
        tl.store(dpre + first, d_gate.to(dpre.dtype.element_ty), mask=inside)
        tl.store(dpre + first + n_kept, d_up.to(dpre.dtype.element_ty), mask=inside)
    else:
        u = plus_bias(tl.load(pre + first, mask=inside, other=0.0), b_up, channel, inside_n)
        h, _, d_up = hidden_and_grads(u, u, grad, False, ACT)
        tl.store(dpre + first, d_up.to(dpre.dtype.element_ty), mask=inside)
    tl.store(dh + t[:, None] * dh_t + n[None, :], h.to(dh.dtype.element_ty), mask=inside)


def _by_index(kernel, src: Tensor, index: Tensor, out: Tensor, dim: int) -> Tensor:
    rows, cols = (16, 256) if out.stride(1) == 1 else (256, 16)
    grid = (triton.cdiv(out.shape[0], rows), triton.cdiv(out.shape[1], cols))
    kernel[grid](src, index, out, *out.shape, *src.stride(), *out.stride(), DIM=dim, ROWS=rows, COLS=cols)
    return out


def take(src: Tensor, idx: Tensor, out: Tensor, *, dim: int) -> Tensor:
    """Fill `out` with rows (dim 0) or columns (dim 1) `idx` of the matrix `src`. Any strides."""
    return _by_index(take_kernel, src, idx, out, dim)


def put(src: Tensor, at: Tensor, out: Tensor, *, dim: int) -> Tensor:
    """Fill all of `out`: line i is line at[i] of `src`, or zero where at[i] < 0. Any strides."""
    return _by_index(put_kernel, src, at, out, dim)


def positions(idx: Tensor, n: int) -> Tensor:
    """int64 [n]: where each of n channels stands in `idx`, -1 for the omitted ones."""
    return idx.new_full((n,), -1).scatter_(0, idx, torch.arange(idx.shape[0], device=idx.device))


def act_forward(
    gate: Tensor | None, up: Tensor, h: Tensor, act: str, biases: tuple[Tensor | None, Tensor | None], *,
    idx: Tensor | None = None, save: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """h from preactivations without bias; `save=(pre, at)` also copies the kept ones to `pre`. h may be `up` itself."""
    T, N = up.shape
    pre, at = save if save is not None else (None, None)
    n_kept = 0 if pre is None else pre.shape[1] // (1 if gate is None else 2)
    act_kernel[(triton.cdiv(T, 8), triton.cdiv(N, 256))](
        gate, up, h, pre, *biases, idx, at, T, N, n_kept, up.stride(0), h.stride(0), 0 if pre is None else
        pre.stride(0),
        ACT=act, TOKENS=8, CHANNELS=256,
    )  # fmt: skip
    return h


def act_backward(
    pre: Tensor, dh: Tensor, dpre: Tensor, act: str, biases: tuple[Tensor | None, Tensor | None], idx: Tensor | None
) -> None:
    """Fill `dpre` and turn `dh` into h."""
    T, K = dh.shape
    act_backward_kernel[(triton.cdiv(T, 8), triton.cdiv(K, 256))](
        pre, dh, dpre, *biases, idx, T, K, pre.stride(0), dh.stride(0),
        GATED=pre.shape[1] != K, ACT=act, TOKENS=8, CHANNELS=256,
    )  # fmt: skip
