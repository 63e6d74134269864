"""What Upcycle sees of the model on its held-out batch: recall of the best channels, the gap, how channels are used.

Recall is measured as mass: of what the best `keep` channels of every bank contribute, the share that the predictor's
choice contributes. Random choice is measured beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fallow.methods.upcycle.layers import GatedFFN
from fallow.methods.upcycle.predictors import judged
from fallow.methods.watching import Watch
from fallow.ops import bank_ffn


def report(layer: GatedFFN, x_TD: Tensor) -> dict[str, float]:
    """Numbers of one layer on inputs x.

    Returns:
        recall: contribution of the chosen channels over that of the best `keep` per bank.
        random: the same of a random choice.
        found: share of the best channels that were chosen.
        selected: share of all channels that were.
        entropy: of how often a bank's channels are chosen, in units of the even distribution's: 1 is even.
        dead: share of channels that no token chose.
    """
    w = layer.view.weights()
    h_TF = layer.hidden(x_TD, w)
    size_TF = judged(h_TF, w, layer.config)
    best_TF = bank_ffn.bank_mask(size_TF, bank=layer.bank, keep=layer.keep)
    chosen_TF = layer.mask(x_TD, h_TF, w)
    noise_TF = torch.rand(h_TF.shape, generator=torch.Generator().manual_seed(layer.number)).to(h_TF.device)
    random_TF = bank_ffn.bank_mask(noise_TF, bank=layer.bank, keep=layer.keep)
    best = (size_TF * best_TF).sum().clamp_min(1e-30)
    used = chosen_TF.float().mean(0).unflatten(0, (-1, layer.bank))
    share = used / used.sum(1, keepdim=True).clamp_min(1e-30)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(1).mean() / torch.tensor(float(layer.bank)).log()
    return {
        "recall": float((size_TF * chosen_TF).sum() / best),
        "random": float((size_TF * random_TF).sum() / best),
        "found": float((chosen_TF & best_TF).sum() / best_TF.sum()),
        "selected": float(chosen_TF.float().mean()),
        "entropy": float(entropy),
        "dead": float((used == 0).float().mean()),
    }


class Look(Watch):
    """The batch that Upcycle looks at."""

    layers: list[GatedFFN]

    def start(self) -> None:
        """Start predictors that have not been, from the batch where there is one, and set thresholds."""

        def begin(layer: GatedFFN, x_TD: Tensor) -> None:
            fresh = not layer.predictor.started
            if fresh:
                layer.predictor.start(layer.view.weights(), x_TD)
            if layer.selection == "threshold":
                layer.set_threshold(x_TD)
            if fresh:
                layer.compensate(x_TD)

        if self.batch is not None:
            self.pass_over(observer=begin)
        # without a batch each layer starts from its weights in its next forward, where FSDP2 has them gathered

    def look(self) -> dict[str, Any]:
        """Losses both ways and every number by layer; nothing where no batch is watched."""
        if self.batch is None:
            return {}
        reports: list[dict[str, float]] = []
        note: Callable[[GatedFFN, Tensor], None] = lambda layer, x: reports.append(report(layer, x))  # noqa: E731
        dense_loss = self.pass_over(observer=note)
        sparse_loss = self.pass_over(sparse=True)
        by_layer = {name: [each[name] for each in reports] for name in reports[0]}
        return {"dense_loss": dense_loss, "sparse_loss": sparse_loss} | by_layer
