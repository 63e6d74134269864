"""The registration of `expert_ffn` with `torch.library`, once for every backend that has kernels of its own.

A backend gives `pad`, `sort`, `forward` and `backward` on tensors (cpu.py says what of). Its name is an argument of the
op, so that a compiled graph keeps the choice that was made outside of it. Saved for backward: x, the preactivations of
the chosen experts ([T·K, C], twice with a gate) and the order of the rows; not the K-fold copy of x, which is cheaper
to gather again than to keep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fallow.ops.expert_ffn import cpu, triton
from fallow.ops.expert_ffn.order import Order, empty_order

_KERNELS = {backend.name: backend for backend in (cpu, triton)}


class Gradients(NamedTuple):
    """What backward fills; None where it is not asked for."""

    x_TD: Tensor | None
    coefficient_TK: Tensor | None
    w_gate_FD: Tensor | None
    w_up_FD: Tensor | None
    w_down_DF: Tensor | None
    b_gate_F: Tensor | None
    b_up_F: Tensor | None


def _kept(x, choice, w_gate, w_up, experts, backend) -> tuple[Tensor, Tensor, Order]:
    """Uninitialised gate_RC, up_RC and order: what forward keeps for backward."""
    order = empty_order(choice, experts, _KERNELS[backend].pad(x.dtype))
    rows, channels = order.token_R.shape[0], w_up.shape[0] // experts
    return x.new_empty(0 if w_gate is None else rows, channels), x.new_empty(rows, channels), order


@torch.library.custom_op("fallow::expert_ffn", mutates_args=())
def forward(
    x: Tensor,
    choice: Tensor,
    coefficient: Tensor | None,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    act: str,
    experts: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_TD, gate_RC, up_RC, *order)."""
    kernels = _KERNELS[backend]
    gate, up, order = _kept(x, choice, w_gate, w_up, experts, backend)
    kernels.sort(choice.contiguous(), kernels.pad(x.dtype), order)
    y = kernels.forward(x.contiguous(), order, (w_gate, w_up, w_down), (b_gate, b_up, b_down), act, gate, up)
    return y, gate, up, order.start_E1, order.count_E, order.token_R, order.slot_TK


@forward.register_fake
def _(x, choice, coefficient, w_gate, w_up, w_down, b_gate, b_up, b_down, act, experts, backend):
    gate, up, order = _kept(x, choice, w_gate, w_up, experts, backend)
    return x.new_empty(x.shape), gate, up, *order


def _gradients(x, slot, w_gate, w_up, w_down, needs) -> Gradients:
    """Uninitialised; those of weights have the strides of the weights where these leave no gaps."""
    need_x, need_coefficient, need_weights, need_b_gate, need_b_up = needs
    gated = w_gate is not None
    return Gradients(
        x.new_empty(x.shape) if need_x else None,
        x.new_empty(slot.shape, dtype=torch.float32) if need_coefficient else None,
        torch.empty_like(w_gate) if need_weights and gated else None,
        torch.empty_like(w_up) if need_weights else None,
        torch.empty_like(w_down) if need_weights else None,
        x.new_empty(w_up.shape[0]) if need_b_gate and gated else None,
        x.new_empty(w_up.shape[0]) if need_b_up else None,
    )


@torch.library.custom_op("fallow::expert_ffn_backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    order: list[Tensor],
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    act: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """The seven `Gradients`; what was not asked for is an empty tensor. `needs`: x, coefficient, weights,
    b_gate, b_up."""
    found = _gradients(x, order[-1], w_gate, w_up, w_down, needs)
    weights = (w_gate, w_up, w_down)
    _KERNELS[backend].backward(dy.contiguous(), x.contiguous(), gate, up, Order(*order), weights, act, found)
    return [x.new_empty(0) if t is None else t for t in found]


@backward.register_fake
def _(dy, x, gate, up, order, w_gate, w_up, w_down, act, backend, needs):
    return [x.new_empty(0) if t is None else t for t in _gradients(x, order[-1], w_gate, w_up, w_down, needs)]


def _setup(ctx, inputs, output):
    x, _, coefficient, w_gate, w_up, w_down, b_gate, b_up, b_down, ctx.act, _, ctx.backend = inputs
    ctx.save_for_backward(x, w_gate, w_up, w_down, *output[1:])
    ctx.given = [t is not None for t in (x, None, coefficient, w_gate, w_up, w_down, b_gate, b_up, b_down)]
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 12
    x, w_gate, w_up, w_down, gate, up, *order = ctx.saved_tensors
    need = [a and b for a, b in zip(ctx.needs_input_grad, ctx.given, strict=False)]
    needs = [need[0], need[2], need[3] or need[4] or need[5], need[6], need[7]]
    found: list[Tensor | None] = [None] * 7
    if any(needs):
        found = list(backward(dy, x, gate, up, order, w_gate, w_up, w_down, ctx.act, ctx.backend, needs))
    db_down = dy.sum(0) if need[8] else None
    gradients = [found[0], None, *found[1:], db_down]
    return *(g if n else None for g, n in zip(gradients, need, strict=True)), None, None, None


forward.register_autograd(_autograd, setup_context=_setup)


def run(
    x: Tensor,
    choice_TK: Tensor,
    coefficient_TK: Tensor | None,
    weights: tuple[Tensor | None, ...],
    act: str,
    experts: int,
    backend: str,
) -> Tensor:
    """y [..., D] of x [..., D] through the named backend; `weights`: gate, up, down and their biases."""
    x_TD = x.reshape(-1, x.shape[-1])
    return forward(x_TD, choice_TK, coefficient_TK, *weights, act, experts, backend)[0].view(x.shape)  # type: ignore[arg-type]
