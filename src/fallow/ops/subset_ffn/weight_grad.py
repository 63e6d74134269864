"""`subset_ffn` with omit_in="weight_grad": the stock FFN, whose linears form the weight gradient of kept channels only.

    forward   y = x Wᵀ + b            as ever
    backward  dx = dy W               as ever
              dW[kept] = dy[:, kept]ᵀ x     (channels are rows: gate and up)
              dW[:, kept] = dyᵀ x[:, kept]  (channels are columns: down)

Of the nine GEMMs of an FFN's step six stay whole and three shrink to K/F. The cost beside them is 3·T·K elements copied
and 3·F·D gradient elements written. One GEMM for gate and up together, as in cpu.py, was tried first: copying both
whole weights twice and recomputing the activation ate half of what the smaller gradients save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops.activation import activation
from fallow.ops.gather import gather_cols, spread_cols, spread_rows


@torch.library.custom_op("fallow::partial_weight_grad", mutates_args=())
def _weight_grad(dy: Tensor, x: Tensor, idx: Tensor, dim: int, n_channels: int) -> Tensor:
    """[O, I] = dyᵀ x for the kept rows (dim 0) or columns (dim 1), zeros elsewhere. idx: [K], or [S, K] for S runs of
    T/S tokens."""
    shape = (n_channels, x.shape[1]) if dim == 0 else (dy.shape[1], n_channels)
    if idx.dim() == 1:
        return _of_kept(dy, x, idx, dim, n_channels)
    total = x.new_zeros(shape)
    for dy_s, x_s, kept in zip(dy.chunk(len(idx)), x.chunk(len(idx)), idx, strict=True):
        total += _of_kept(dy_s, x_s, kept, dim, n_channels)
    return total


def _of_kept(dy: Tensor, x: Tensor, kept: Tensor, dim: int, n_channels: int) -> Tensor:
    if dim == 0:
        return spread_rows(torch.mm(_columns(dy, kept).t(), x), kept, n_channels)
    return spread_cols(torch.mm(dy.t(), _columns(x, kept)), kept, n_channels)


def _columns(x: Tensor, kept: Tensor) -> Tensor:
    return gather_cols(x, kept, x.new_empty(x.shape[0], len(kept)))


@_weight_grad.register_fake
def _(dy, x, idx, dim, n_channels):
    return x.new_empty((n_channels, x.shape[1]) if dim == 0 else (dy.shape[1], n_channels))


class _PartialLinear(torch.autograd.Function):
    """x [T, I], w [O, I], b [O] or None -> x wᵀ + b. `dim`: along which dimension of w the channels lie."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, b: Tensor | None, idx: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x, w, idx)
        ctx.dim, ctx.biased = dim, b is not None
        return torch.nn.functional.linear(x, w, b)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        x, w, idx = ctx.saved_tensors
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        dy = dy.contiguous()
        dx = torch.mm(dy, w) if need_dx else None
        dw = _weight_grad(dy, x, idx, ctx.dim, w.shape[ctx.dim]) if need_dw else None
        db = None
        if ctx.biased and need_db:
            db = dy.sum(0) if ctx.dim == 1 else _bias_grad(dy, idx)
        return dx, dw, db, None, None


def _bias_grad(dy: Tensor, idx: Tensor) -> Tensor:
    """[O]: dy summed over the tokens that keep the channel."""
    if idx.dim() == 1:
        return torch.zeros_like(dy[0]).index_copy(0, idx, dy.index_select(1, idx).sum(0))
    per_sequence = dy.unflatten(0, (len(idx), -1)).sum(1)
    return torch.zeros_like(per_sequence).scatter(1, idx, per_sequence.gather(1, idx)).sum(0)


def subset_ffn(
    x_TD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    idx_K: Tensor,
    *,
    w_gate_FD: Tensor | None = None,
    b_gate_F: Tensor | None = None,
    b_up_F: Tensor | None = None,
    b_down_D: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """Arguments as `fallow.ops.subset_ffn.subset_ffn`. Under autocast, everything is cast to its dtype."""
    autocast = torch.is_autocast_enabled(x_TD.device.type)
    dtype = torch.get_autocast_dtype(x_TD.device.type) if autocast else x_TD.dtype

    def linear(x: Tensor, w: Tensor, b: Tensor | None, dim: int) -> Tensor:
        if autocast:
            x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
        return _PartialLinear.apply(x, w, b, idx_K, dim)  # type: ignore[return-value]

    if w_gate_FD is None:
        h = activation(linear(x_TD, w_up_FD, b_up_F, 0), act)
    else:
        h = activation(linear(x_TD, w_gate_FD, b_gate_F, 0), act) * linear(x_TD, w_up_FD, b_up_F, 0)
    return linear(h, w_down_DF, b_down_D, 1)
