"""Measured sensitivity of each layer (ours): how much the loss of one batch rises when that layer alone is sparse.

L + 1 forward passes without gradient on at most 512 tokens of the first training batch: about 3 steps' time for 30
layers, once.
The obvious cheaper proxy, the error at the layer's own output, ranks early layers as harmless though their error is
amplified
by every layer after them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fallow.errors import ConfigError

if TYPE_CHECKING:
    from fallow.methods.sat.method import SATMethod

TOKENS = 512


@torch.no_grad()
def loss_increase(method: SATMethod, args: tuple, kwargs: dict) -> list[float]:
    """Loss with layer l alone sparse, minus dense loss, in nats, for every layer."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    labels = kwargs.get("labels")
    if ids is None or labels is None:
        raise ConfigError(
            "SAT: layer_rates='sensitivity' needs input_ids and labels in the first batch; use 'late' instead"
        )
    ids, labels = ids[:1, :TOKENS], labels[:1, :TOKENS]
    layers = [[x for x in (*method.ffns, *method.attentions) if x.layer == i] for i in range(method.n_layers)]
    model, keeps = method.model, {id(x): x.keep for group in layers for x in group}

    def loss() -> float:
        out: Tensor = model(input_ids=ids, labels=labels).loss
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(out)
            out = out / torch.distributed.get_world_size()
        return float(out)

    def only(sparse: int | None) -> None:
        for i, group in enumerate(layers):
            for x in group:
                x.set_keep(keeps[id(x)] if i == sparse else None, x.step)
        for attention in method.attentions:
            attention.activate(True)

    hook_state, method.weights = method.weights, [1.0] * method.n_layers
    refresh, method._refresh = method._refresh, False
    try:
        only(None)
        base = loss()
        increases = []
        for i in range(method.n_layers):
            only(i)
            increases.append(max(loss() - base, 0.0))
    finally:
        method.weights, method._refresh = hook_state, refresh
        for group in layers:
            for x in group:
                x.set_keep(keeps[id(x)], x.step)
    return increases
