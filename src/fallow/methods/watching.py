"""A fixed held-out batch, and passes over it: what a method sees of the model without disturbing its training.

A pass runs in evaluation mode without gradients, draws no random number, and leaves every flag as it was. Observers on
the layers read out what they need while it goes. Rank 0's batch is every rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fallow.methods.ranks import agreed
from fallow.shards import reshard


class Watched(Protocol):
    """A layer that a method has put in the place of an FFN."""

    sparse: bool
    """Whether its next forward computes less than all."""
    observer: Callable[[Any, Tensor], None] | None
    """Called in forward with (layer, x [T, D])."""


MOST_TOKENS = 2048
"""At most so many tokens of a batch are watched."""


class Watch:
    """One batch, and the model it is shown to."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[Watched]) -> None:
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

    def pass_over(self, *, sparse: bool = False, observer: Callable[[Any, Tensor], None] | None = None) -> float:
        """Loss on the batch in nats per token."""
        assert self.batch is not None
        with self.passing(sparse=sparse, observer=observer):
            loss = float(self.model(**self.batch, use_cache=False).loss)
        reshard(self.model)
        return loss

    @contextmanager
    def passing(self, *, sparse: bool = False, observer: Callable[[Any, Tensor], None] | None = None) -> Iterator[None]:
        """Evaluation mode without gradients, every layer dense or sparse; afterwards as before, module by module."""
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
