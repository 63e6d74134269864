"""Reordering the neurons of an FFN in place: its parameters, gradients, and what the optimizer keeps of them.

A neuron is a row of the gate and up projection, an entry of their biases and a column of the down projection. The
model computes the same function after as before, up to the order of one sum. Under FSDP2 a tensor is gathered,
reordered and each rank's part written back; that happens at switches only. Cost: one copy of an FFN and its state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fallow.anatomy import ChannelParam, FFNView
from fallow.shards import put, whole


@torch.no_grad()
def permute(view: FFNView, order_F: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """The neuron at place order_F[i] goes to place i. Under FSDP2 a collective."""
    for where in view.parameters_along_channels():
        index = torch.cat([order_F + s * view.n_channels for s in range(where.segments)])
        _reorder(where.parameter, where.dim, index)
        if where.parameter.grad is not None:
            _reorder(where.parameter.grad, where.dim, index)
        state: dict[str, Any] = optimizer.state.get(where.parameter, {}) if optimizer is not None else {}
        for value in state.values():
            _follow(value, where, index)


def _follow(value: Any, where: ChannelParam, index: Tensor) -> None:
    """State of the parameter's shape, or one number per channel (clocks of lazy rows)."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return
    if value.shape == where.parameter.shape:
        _reorder(value, where.dim, index)
    elif value.shape == where.parameter.shape[where.dim : where.dim + 1]:
        _reorder(value, 0, index)


def _reorder(x: Tensor, dim: int, index: Tensor) -> None:
    put(x, whole(x).index_select(dim, index.to(x.device)))
