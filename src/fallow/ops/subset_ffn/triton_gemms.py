"""Fused Triton GEMMs of `subset_ffn`: the tile loader reads kept rows through the index, the epilogue does the rest.

`gate_up` is both input projections with the activation; `grad_hidden` is dh with both activation derivatives;
`grad_input` reads kept rows of both weights; `grad_rows` and `grad_cols` write straight to the kept rows (columns) of a
zeroed full-size gradient. Against torch.mm on gathered copies this saves about 3·K·D elements of gather per direction
and one round trip of h, and pays the distance between a Triton GEMM and cuBLAS: benchmarks/gpu_all.py times both.
Tile sizes are autotuned at first use per width and dtype (T excluded, so a ragged last batch does not tune again).
"""

# pyright: reportArgumentType=false
# (Triton annotates compile-time arguments as `tl.constexpr` and takes plain values for them.)

# triton types a jitted function as one that never returns, so a helper's result looks wrong to pyright
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fallow.ops.subset_ffn.triton_kernels import INTERPRETED, hidden_and_grads, plus_bias, value_and_slope


def _config(m: int, n: int, r: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BM": m, "BN": n, "BR": r}, num_warps=warps, num_stages=stages)


_TILES = (
    [_config(16, 16, 16, 1, 1)]
    if INTERPRETED
    else [
        _config(128, 128, 64, 8, 3),
        _config(128, 128, 32, 8, 4),
        _config(128, 64, 64, 8, 4),  # grad_hidden's epilogue spills registers with more of a tile per thread
        _config(128, 64, 64, 4, 4),
        _config(64, 128, 64, 4, 4),
        _config(64, 64, 32, 4, 3),
    ]
)


def _tuned(kernel):
    return triton.autotune(configs=_TILES, key=["D", "K"])(kernel)


@triton.jit
def tile_offsets(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """(rows, cols) of this program's output tile, in groups of 8 row tiles so that neighbours share operands in L2."""
    n_m = tl.cdiv(M, BM)
    n_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    group = pid // (8 * n_n)
    tall = tl.minimum(n_m - group * 8, 8)
    within = pid % (8 * n_n)
    m = (group * 8 + within % tall) * BM + tl.arange(0, BM)
    n = (within // tall) * BN + tl.arange(0, BN)
    return m.to(tl.int64), n.to(tl.int64)


@triton.jit
def channels(idx, n, inside):
    """Weight row of each column n: idx[n], or n itself without an index."""
    row = n
    if idx is not None:
        row = tl.load(idx + n, mask=inside, other=0)
    return row


@_tuned
@triton.jit
def gate_up_kernel(
    x, w_gate, w_up, b_gate, b_up, idx, at, pre, h, T, D, N, K, w_f, w_d,
    ACT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """h [T, N] over N channels (rows idx of the weights); preactivations go to `pre` at column at[n], if not
    negative."""
    t, n = tile_offsets(T, N, BM, BN)
    in_t, in_n = t < T, n < N
    row = channels(idx, n, in_n)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BR):
        d = start + tl.arange(0, BR)
        in_d = d < D
        x_tile = tl.load(x + t[:, None] * D + d[None, :], mask=in_t[:, None] & in_d[None, :], other=0.0)
        at_w = row[None, :] * w_f + d[:, None] * w_d
        mask_w = in_d[:, None] & in_n[None, :]
        up = tl.dot(x_tile, tl.load(w_up + at_w, mask=mask_w, other=0.0), up, input_precision=PRECISION)
        if w_gate is not None:
            gate = tl.dot(x_tile, tl.load(w_gate + at_w, mask=mask_w, other=0.0), gate, input_precision=PRECISION)
    slot = n
    if at is not None:
        slot = tl.load(at + n, mask=in_n, other=-1)
    inside = in_t[:, None] & in_n[None, :]
    kept = inside & (slot >= 0)[None, :]
    element = h.dtype.element_ty
    # Rounded to the storage type before the activation, so that forward and backward see the same preactivation.
    raw_up = up.to(element)
    u = plus_bias(raw_up, b_up, row, in_n)
    if w_gate is not None:
        raw_gate = gate.to(element)
        value, _ = value_and_slope(plus_bias(raw_gate, b_gate, row, in_n), ACT)
        value = value * u
        to = pre + t[:, None] * (2 * K) + slot[None, :]
        tl.store(to, raw_gate, mask=kept)
        tl.store(to + K, raw_up, mask=kept)
    else:
        value, _ = value_and_slope(u, ACT)
        tl.store(pre + t[:, None] * K + slot[None, :], raw_up, mask=kept)
    tl.store(h + t[:, None] * N + n[None, :], value.to(element), mask=inside)


@_tuned
@triton.jit
def grad_hidden_kernel(
    dy, w_down, pre, b_gate, b_up, idx, dpre, h, T, D, K, w_d, w_k, GATED: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dh = dy · w_down[D, K]; the epilogue turns it into dpre and recomputes h."""
    t, k = tile_offsets(T, K, BM, BN)
    in_t, in_k = t < T, k < K
    row = channels(idx, k, in_k)
    dh = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BR):
        d = start + tl.arange(0, BR)
        in_d = d < D
        dy_tile = tl.load(dy + t[:, None] * D + d[None, :], mask=in_t[:, None] & in_d[None, :], other=0.0)
        w_tile = tl.load(w_down + d[:, None] * w_d + k[None, :] * w_k, mask=in_d[:, None] & in_k[None, :], other=0.0)
        dh = tl.dot(dy_tile, w_tile, dh, input_precision=PRECISION)
    inside = in_t[:, None] & in_k[None, :]
    element = h.dtype.element_ty
    if GATED:
        first = t[:, None] * (2 * K) + k[None, :]
        g = plus_bias(tl.load(pre + first, mask=inside, other=0.0), b_gate, row, in_k)
        u = plus_bias(tl.load(pre + first + K, mask=inside, other=0.0), b_up, row, in_k)
        value, d_gate, d_up = hidden_and_grads(g, u, dh, True, ACT)
        tl.store(dpre + first, d_gate.to(element), mask=inside)
        tl.store(dpre + first + K, d_up.to(element), mask=inside)
    else:
        first = t[:, None] * K + k[None, :]
        u = plus_bias(tl.load(pre + first, mask=inside, other=0.0), b_up, row, in_k)
        value, _, d_up = hidden_and_grads(u, u, dh, False, ACT)
        tl.store(dpre + first, d_up.to(element), mask=inside)
    tl.store(h + t[:, None] * K + k[None, :], value.to(element), mask=inside)


@_tuned
@triton.jit
def grad_input_kernel(
    dpre, w_gate, w_up, idx, dx, T, D, K, w_f, w_d,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx = d_gate · w_gate[idx] + d_up · w_up[idx], one accumulator."""
    t, d = tile_offsets(T, D, BM, BN)
    in_t, in_d = t < T, d < D
    width = K
    if w_gate is not None:
        width = 2 * K
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BR):
        k = start + tl.arange(0, BR)
        in_k = k < K
        at_w = channels(idx, k, in_k)[:, None] * w_f + d[None, :] * w_d
        mask_w = in_k[:, None] & in_d[None, :]
        at_g = t[:, None] * width + k[None, :]
        mask_g = in_t[:, None] & in_k[None, :]
        if w_gate is not None:
            d_gate = tl.load(dpre + at_g, mask=mask_g, other=0.0)
            acc = tl.dot(d_gate, tl.load(w_gate + at_w, mask=mask_w, other=0.0), acc, input_precision=PRECISION)
            at_g += K
        d_up = tl.load(dpre + at_g, mask=mask_g, other=0.0)
        acc = tl.dot(d_up, tl.load(w_up + at_w, mask=mask_w, other=0.0), acc, input_precision=PRECISION)
    tl.store(dx + t[:, None] * D + d[None, :], acc.to(dx.dtype.element_ty), mask=in_t[:, None] & in_d[None, :])


@_tuned
@triton.jit
def grad_outer_kernel(
    left, right, idx, out, T, D, K, left_t, right_t, out_k, out_d,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[channel idx[k], d] = Σ_t left[t, k]·right[t, d], written through the index; (out_k, out_d) are its
    strides."""
    k, d = tile_offsets(K, D, BM, BN)
    in_k, in_d = k < K, d < D
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, T, BR):
        t = (start + tl.arange(0, BR)).to(tl.int64)
        in_t = t < T
        left_tile = tl.load(left + t[:, None] * left_t + k[None, :], mask=in_t[:, None] & in_k[None, :], other=0.0)
        right_tile = tl.load(right + t[:, None] * right_t + d[None, :], mask=in_t[:, None] & in_d[None, :], other=0.0)
        acc = tl.dot(tl.trans(left_tile), right_tile, acc, input_precision=PRECISION)
    row = channels(idx, k, in_k)
    to = out + row[:, None] * out_k + d[None, :] * out_d
    tl.store(to, acc.to(out.dtype.element_ty), mask=in_k[:, None] & in_d[None, :])


def _precision() -> str:
    """fp32 products as torch.mm is set to do them."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _tiles(M: int, N: int):
    return lambda meta: (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)


def gate_up(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, biases: tuple[Tensor | None, Tensor | None],
    idx: Tensor | None, at: Tensor | None, pre: Tensor, h: Tensor, act: str,
) -> None:  # fmt: skip
    """Fill h [T, N] and pre [T, (2)K]. Either `idx` (N = K kept channels) or `at` (N = F, save the kept), or
    neither."""
    (T, D), N, K = x.shape, h.shape[1], pre.shape[1] // (1 if w_gate is None else 2)
    gate_up_kernel[_tiles(T, N)](
        x, w_gate, w_up, *biases, idx, at, pre, h, T, D, N, K, *w_up.stride(), ACT=act, PRECISION=_precision()
    )


def grad_hidden(
    dy: Tensor, w_down_DK: Tensor, pre: Tensor, biases: tuple[Tensor | None, Tensor | None],
    idx: Tensor | None, dpre: Tensor, h: Tensor, act: str,
) -> None:  # fmt: skip
    """Fill dpre (laid out as pre) and h [T, K]."""
    (T, D), K = dy.shape, h.shape[1]
    grad_hidden_kernel[_tiles(T, K)](
        dy, w_down_DK, pre, *biases, idx, dpre, h, T, D, K, *w_down_DK.stride(),
        GATED=pre.shape[1] != K, ACT=act, PRECISION=_precision(),
    )  # fmt: skip


def grad_input(dpre: Tensor, w_gate: Tensor | None, w_up: Tensor, idx: Tensor | None, dx: Tensor) -> None:
    """Fill dx [T, D]."""
    (T, D), K = dx.shape, dpre.shape[1] // (1 if w_gate is None else 2)
    grad_input_kernel[_tiles(T, D)](dpre, w_gate, w_up, idx, dx, T, D, K, *w_up.stride(), PRECISION=_precision())


def grad_outer(per_channel: Tensor, per_width: Tensor, idx: Tensor | None, out: Tensor, *, dim: int) -> None:
    """Write Σ_t per_channel[t, k]·per_width[t, d] to line idx[k] of `out` along `dim`; other lines stay untouched."""
    (T, K), D = per_channel.shape, per_width.shape[1]
    grad_outer_kernel[_tiles(K, D)](
        per_channel, per_width, idx, out, T, D, K, per_channel.stride(0), per_width.stride(0),
        out.stride(dim), out.stride(1 - dim), PRECISION=_precision(),
    )  # fmt: skip
