"""Forward and backward of `subset_ffn` on Triton kernels, in the variants "gather" and "fused" (see triton.py).

`forward` returns y and the preactivations of kept channels; `backward` needs those, x and the weights. The steps that
differ between the variants come in pairs, `_…_gathered` and `_…_fused`. Weights may be row-major or transposed (GPT-2's
Conv1D); a gathered copy and a gradient keep the memory order of their weight, so that every copy is coalesced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops.subset_ffn.triton_gemms import gate_up, grad_hidden, grad_input, grad_outer
from fallow.ops.subset_ffn.triton_kernels import act_backward, act_forward, positions, put, take

Biases = tuple[Tensor | None, Tensor | None]


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Every buffer a kernel is to fill entirely comes from here, so that tests can poison it."""
    return like.new_empty(shape)


def _empty_like(w: Tensor) -> Tensor:
    """As `_empty`, in w's shape and memory order (a transposed weight gets a transposed gradient)."""
    out = _empty(tuple(w.shape[::-1]) if _transposed(w) else tuple(w.shape), w)
    return out.t() if _transposed(w) else out


def _transposed(w: Tensor) -> bool:
    return w.stride(0) == 1 and w.stride(1) != 1


def _rows_in(w_gate: Tensor | None, w_up: Tensor, idx: Tensor) -> Tensor:
    """[(2)K, D]: kept rows of gate, if any, over kept rows of up."""
    K, D = idx.shape[0], w_up.shape[1]
    if w_gate is None:
        shape = (D, K) if _transposed(w_up) else (K, D)
        out = _empty(shape, w_up)
        return take(w_up, idx, out.t() if _transposed(w_up) else out, dim=0)
    out = _empty((2 * K, D), w_up)
    take(w_gate, idx, out[:K], dim=0)
    take(w_up, idx, out[K:], dim=0)
    return out


def _cols_out(w_down: Tensor, idx: Tensor | None) -> Tensor:
    """[D, K]: kept columns of down, in down's memory order."""
    if idx is None:
        return w_down
    D, K = w_down.shape[0], idx.shape[0]
    out = _empty((K, D), w_down).t() if _transposed(w_down) else _empty((D, K), w_down)
    return take(w_down, idx, out, dim=1)


def _hidden_gathered(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    biases: Biases,
    idx: Tensor | None,
    pre: Tensor,
    act: str,
    dense: bool,
) -> Tensor:
    """h, [T, K], or [T, F] of a dense forward; fills `pre` with the kept preactivations, without bias."""
    F, K = w_up.shape[0], pre.shape[1] // (1 if w_gate is None else 2)
    if dense and idx is not None:
        gate = None if w_gate is None else torch.mm(x, w_gate.t())
        up = torch.mm(x, w_up.t())
        return act_forward(gate, up, up, act, biases, save=(pre, positions(idx, F)))
    if idx is not None:
        torch.mm(x, _rows_in(w_gate, w_up, idx).t(), out=pre)
    else:
        if w_gate is not None:
            torch.mm(x, w_gate.t(), out=pre[:, :K])
        torch.mm(x, w_up.t(), out=pre[:, -K:])
    gate = None if w_gate is None else pre[:, :K]
    return act_forward(gate, pre[:, -K:], _empty((x.shape[0], K), x), act, biases, idx=idx)


def _hidden_fused(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    biases: Biases,
    idx: Tensor | None,
    pre: Tensor,
    act: str,
    dense: bool,
) -> Tensor:
    """As `_hidden_gathered`, in one kernel."""
    F, K = w_up.shape[0], pre.shape[1] // (1 if w_gate is None else 2)
    through = dense and idx is not None
    h = _empty((x.shape[0], F if through else K), x)
    at = positions(idx, F) if through and idx is not None else None
    gate_up(x, w_gate, w_up, biases, None if through else idx, at, pre, h, act)
    return h


def forward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    idx: Tensor | None,
    w_gate: Tensor | None,
    biases: Biases,
    b_down: Tensor | None,
    *,
    act: str,
    omit_in: str,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """(y [T, D], pre): `pre` is [T, 2K] when gated (gate, then up), else [T, K], without bias."""
    idx = None if omit_in == "weight_grad" else idx
    dense = omit_in == "backward"
    K = w_up.shape[0] if idx is None else idx.shape[0]
    pre = _empty((x.shape[0], K if w_gate is None else 2 * K), x)
    hidden = _hidden_fused if fused else _hidden_gathered
    h = hidden(x, w_gate, w_up, biases, idx, pre, act, dense)
    w = w_down if dense else _cols_out(w_down, idx)
    return (torch.mm(h, w.t()) if b_down is None else torch.addmm(b_down, h, w.t())), pre


def backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    idx: Tensor | None,
    w_gate: Tensor | None,
    biases: Biases,
    *,
    act: str,
    omit_in: str,
    need: list[bool],
    fused: bool,
) -> list[Tensor]:
    """Gradients of [x, w_up, w_down, w_gate, b_gate, b_up, b_down]; empty where `need` is false."""
    (T, _), F, K = x.shape, w_up.shape[0], pre.shape[1] // (1 if w_gate is None else 2)
    through = None if omit_in == "weight_grad" else idx  # the channels that gradients pass through
    dpre, w_down_K = _empty((T, pre.shape[1]), pre), _cols_out(w_down, through)
    if fused:
        h = _empty((T, K), x)
        grad_hidden(dy, w_down_K, pre, biases, through, dpre, h, act)
    else:
        h = torch.mm(dy, w_down_K)
        act_backward(pre, h, dpre, act, biases, through)
    d_gate, d_up = dpre[:, :K], dpre[:, -K:]
    if idx is not None and through is None:
        h, d_gate, d_up = (take(t, idx, _empty((T, len(idx)), t), dim=1) for t in (h, d_gate, d_up))
    at = None if idx is None or fused else positions(idx, F)

    def none() -> Tensor:
        return x.new_empty(0)

    def bias(per_token: Tensor) -> Tensor:
        total = per_token.sum(0, dtype=torch.float32).to(x.dtype)
        return total if idx is None else x.new_zeros(F).index_copy_(0, idx, total)

    def grad_x() -> Tensor:
        if fused:
            dx = _empty(tuple(x.shape), x)
            grad_input(dpre, w_gate, w_up, through, dx)
            return dx
        if through is not None:
            return torch.mm(dpre, _rows_in(w_gate, w_up, through))
        dx = torch.mm(dpre[:, -K:], w_up)
        return dx if w_gate is None else dx.addmm_(dpre[:, :K], w_gate)

    def grad_w(per_channel: Tensor, per_width: Tensor, w: Tensor, dim: int) -> Tensor:
        if fused:
            return _weight_grad_fused(per_channel, per_width, idx, w, dim)
        return _weight_grad_gathered(per_channel, per_width, at, w, dim)

    return [
        grad_x() if need[0] else none(),
        grad_w(d_up, x, w_up, 0) if need[1] else none(),
        grad_w(h, dy, w_down, 1) if need[2] else none(),
        grad_w(d_gate, x, w_gate, 0) if need[3] and w_gate is not None else none(),
        bias(d_gate) if need[4] else none(),
        bias(d_up) if need[5] else none(),
        dy.sum(0) if need[6] else none(),
    ]


def _weight_grad_gathered(per_channel: Tensor, per_width: Tensor, at: Tensor | None, w: Tensor, dim: int) -> Tensor:
    """Full-size gradient of w from [T, K] and [T, D]; channels are its rows (dim 0) or columns (dim 1)."""
    left, right = (per_channel, per_width) if dim == 0 else (per_width, per_channel)
    kept = torch.mm(right.t(), left).t() if _transposed(w) else torch.mm(left.t(), right)
    return kept if at is None else put(kept, at, _empty_like(w), dim=dim)


def _weight_grad_fused(per_channel: Tensor, per_width: Tensor, idx: Tensor | None, w: Tensor, dim: int) -> Tensor:
    """As `_weight_grad_gathered`, in one kernel after a memset."""
    out = _empty_like(w) if idx is None else _empty_like(w).zero_()
    grad_outer(per_channel, per_width, idx, out, dim=dim)
    return out
