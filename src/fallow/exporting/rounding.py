"""FFN weights in 8 bits for `--to fallow`, and the layers that are better left as they are.

A channel's row of the down projection may be nearly a single number: a channel that writes a massive activation, which
later layers use as an attention sink. Its step of 1/127 of that number is as large as the rest of the row, and every
token attends to the result: in SmolLM2-135M one layer of 30 costs 0.046 nats and the other 29 nothing measurable. Which
layer it is only the loss tells (other layers have such rows and do not mind), so suspects are tried, one at a time.
Finer steps for such rows would need a format that the kernels do not read. With that layer spared, int8 costs 0.006 ±
0.003 nats on WikiText-2, sparse; low-bit predictors are made anew of the rounded weights and are none the worse for it.
Cost: a dense pass over the watched batch for every suspect.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from fallow.methods.upcycle import UpcycleMethod
from fallow.methods.upcycle.layers import GatedFFN
from fallow.ops.bank_ffn import int8_rows

PEAK = 0.9
"""A row is suspect whose largest entry has at least this share of its norm."""
COSTLY = 0.005
"""Nats per token; a layer stays as it is that costs more."""


class Rounded(NamedTuple):
    """FFN weights in 8 bits."""

    layers: list[int]
    """Which layers."""
    stored: dict[str, Tensor]
    """As the file has them: codes and scales."""
    whole: dict[str, Tensor]
    """What they stand for, fp32, under the stock names and in the stock shapes."""
    said: list[str]
    """One sentence for each layer that was left as it is."""


@torch.no_grad()
def round_ffns(model: PreTrainedModel, handle: UpcycleMethod, single: dict[str, Tensor]) -> Rounded:
    """The weights of all layers that rounding does not harm.

    Args:
        model: the model in hand, in evaluation mode.
        handle: the one on it.
        single: its weights in fp32.
    """
    whole = {layer.number: _whole(layer) for layer in handle.layers}
    costs = _costs(model, handle, single, whole)
    kept = [n for n in whole if costs.get(n, 0.0) <= COSTLY]
    stored: dict[str, Tensor] = {}
    for n in kept:
        for name, weight in _weights(handle.layers[n]).items():
            rows, layer = int8_rows(weight), name.removesuffix(".weight")
            stored[f"{layer}.codes"], stored[f"{layer}.scale"] = rows
    dtype = str(model.dtype).removeprefix("torch.")
    said = [f"layer {n} stays in {dtype}: in int8 it alone costs {costs[n]:+.4f} nats" for n in whole if n not in kept]
    return Rounded(kept, stored, {k: v for n in kept for k, v in whole[n].items()}, said)


def _weights(layer: GatedFFN) -> dict[str, Tensor]:
    """Name -> weight with a row per channel."""
    return {
        where.name: where.parameter.detach().movedim(where.dim, 0)
        for where in layer.view.parameters_along_channels()
        if where.parameter.dim() == 2
    }


def _whole(layer: GatedFFN) -> dict[str, Tensor]:
    dims = {where.name: where.dim for where in layer.view.parameters_along_channels()}
    return {name: int8_rows(w).dense(torch.float32).movedim(0, dims[name]) for name, w in _weights(layer).items()}


def _costs(
    model: PreTrainedModel, handle: UpcycleMethod, single: dict[str, Tensor], whole: dict[int, dict[str, Tensor]]
) -> dict[int, float]:
    """Suspect layer -> nats on the watched batch that are won where it alone stays as it is. Dense: that is where the
    noise of chosen channels is not."""
    batch, suspects = handle.watched.batch, [n for n in whole if _suspect(handle.layers[n])]
    if batch is None or not suspects:
        return {}

    def loss(spared: int | None = None) -> float:
        weights = single | {k: v for n, each in whole.items() if n != spared for k, v in each.items()}
        answer: Any = functional_call(model, weights, kwargs=batch | {"use_cache": False})
        return float(answer.loss)

    with handle.in_mode("dense"):
        all_of_them = loss()
        return {n: all_of_them - loss(n) for n in suspects}


def _suspect(layer: GatedFFN) -> bool:
    down_FD = layer.view.weights().w_down_DF.detach().float().t()
    return bool((down_FD.abs().amax(1) >= PEAK * down_FD.norm(dim=1).clamp_min(1e-30)).any())
