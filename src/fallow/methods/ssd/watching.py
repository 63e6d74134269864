"""The fixed held-out batch, and passes over it: what SSD sees of the model without disturbing its training.

A pass runs in evaluation mode without gradients, draws no random number, and leaves every flag as it was. Observers on
the layers read out what they need while it goes. Rank 0's batch and numbers are every rank's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fallow.methods.ssd.layers import ExpertFFN, Observer
from fallow.methods.ssd.monitor import LayerReport, Patterns, Watcher, mean_of
from fallow.methods.ssd.ranks import agreed
from fallow.methods.ssd.switching import Seen
from fallow.shards import reshard

MOST_TOKENS = 2048
"""At most so many tokens of a batch are watched."""


class Watch:
    """One batch, and the model it is shown to."""

    def __init__(self, model: PreTrainedModel, layers: list[ExpertFFN]) -> None:
        self.model, self.layers = model, layers
        self.batch: dict[str, Tensor] | None = None
        self.looking = False
        """A pass is under way."""

    def take(self, batch: dict[str, Tensor]) -> None:
        """Watch this batch from now on; labels are the inputs where there are none."""
        if "input_ids" not in batch:
            return
        rows = max(1, MOST_TOKENS // batch["input_ids"].shape[1])
        device = self.model.device
        kept = {k: agreed(v[:rows].detach().to(device, copy=True)) for k, v in sorted(batch.items()) if v.dim() >= 2}
        self.batch = {"labels": kept["input_ids"]} | kept

    def look(self, *, sparse: bool = False, observer: Observer | None = None) -> float:
        """Loss on the batch in nats per token."""
        assert self.batch is not None
        with self._evaluating(sparse=sparse, observer=observer):
            loss = float(self.model(**self.batch, use_cache=False).loss)
        reshard(self.model)
        return loss

    @contextmanager
    def _evaluating(self, *, sparse: bool, observer: Observer | None) -> Iterator[None]:
        """Evaluation mode with every layer dense or sparse; afterwards as before, module by module."""
        flags = [(module, module.training) for module in self.model.modules()]
        before = [(layer.sparse, layer.observer) for layer in self.layers]
        self.looking = True
        try:
            self.model.eval()
            for layer in self.layers:
                layer.sparse, layer.observer = sparse, observer
            # observers read numbers out and differ each time: a compiled model would be compiled anew at every look
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.looking = False
            for layer, (was, watched) in zip(self.layers, before, strict=True):
                layer.sparse, layer.observer = was, watched
            for module, training in flags:
                module.training = training

    def observe(self, patterns: list[Patterns], number: int, *, sparse: bool) -> tuple[Seen, dict[str, list[Any]]]:
        """Observation `number`: (means over layers and the losses, every number by layer); `sparse`: also the loss by
        experts."""
        watcher = Watcher(patterns, number)
        dense_loss = self.look(observer=watcher)
        sparse_loss = self.look(sparse=True) if sparse else None
        reports = watcher.reports
        means = {
            "similarity": mean_of(reports, lambda r: r.similarity),
            "zeros": mean_of(reports, lambda r: r.zeros),
            "dense_loss": dense_loss,
            "sparse_loss": sparse_loss,
        }
        # every rank computes the same numbers, but a decision must not hang on that
        numbers = [float("nan") if m is None else m for m in means.values()]
        told = agreed(torch.tensor(numbers, dtype=torch.float64, device=self.model.device)).tolist()
        seen = Seen(**{n: None if v != v else v for n, v in zip(means, told, strict=True)})
        return seen, {c: [getattr(r, c) for r in reports] for c in LayerReport.__dataclass_fields__}
