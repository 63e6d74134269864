"""The dense parent as teacher: divergence of its next-token distribution, and distance of its FFNs' outputs.

The parent is a frozen copy of the model as it was when it was made sparse, or another model of its shape (`teacher`);
it sees the same batch, without gradients.
Cost: the parent's forward pass, and one copy of the weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fallow import anatomy
from fallow.errors import ConfigError


class Parent:
    """The model as it is now, frozen. Make it before anything is installed in the model."""

    def __init__(self, model: PreTrainedModel, *, with_outputs: bool, teacher: str | None = None) -> None:
        """Raises ConfigError: `teacher` cannot be loaded, or has other tensors than the model."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if teacher is not None:
            _take_weights(self.model, teacher)
        self.outputs: list[Tensor] = []
        if with_outputs:
            for view in anatomy.inspect(self.model).ffns:
                view.install(lambda x, view=view: self._noted(view.dense(x)))

    def _noted(self, y: Tensor) -> Tensor:
        self.outputs.append(y)
        return y

    @torch.no_grad()
    def logits(self, given: dict[str, Any]) -> Tensor:
        """[B, T, V] for what the model was called with; `outputs` then holds its FFNs' outputs in layer order."""
        self.outputs.clear()
        self.model.to(next(iter(given.values())).device)
        inputs = {k: v for k, v in given.items() if k in ("input_ids", "position_ids", "attention_mask")}
        return self.model(**inputs, use_cache=False).logits


def _take_weights(model: PreTrainedModel, name: str) -> None:
    """The weights of another model, in this one's dtype."""
    try:
        given = AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype)
        model.load_state_dict(given.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        first = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"Upcycle: teacher {name!r} cannot teach this model ({first}); name one of its shape"
        ) from None


def distance(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """fp32 scalar: mean over layers of the squared distance, relative to the parent's mean square in that layer."""
    per_layer = [
        (a.float() - b.float()).square().mean() / b.float().square().mean().clamp_min(1e-20)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(per_layer).mean()
