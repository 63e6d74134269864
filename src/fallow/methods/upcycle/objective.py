"""What Upcycle's training learns from besides the text: added to the loss that the model returned.

    loss = (1 - distill) · text + distill · KL(teacher || sparse) + hidden_loss · distance + predictor_loss · predictors

The teacher is the dense parent or another model (`Parent`), or with `teacher="self"` the dense mode of the same step,
which then learns from the text undiminished.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fallow.methods.upcycle.config import Upcycle
from fallow.methods.upcycle.layers import GatedFFN
from fallow.methods.upcycle.pairing import halves
from fallow.methods.upcycle.parent import Parent, distance
from fallow.ops.divergence import divergence


class Objective:
    """Make it before anything is installed in the model. Attributes:

    paired: whether training computes every batch in both modes.
    parent: the teacher, where it is not the model itself.
    outputs: the FFNs' outputs of this forward, in layer order, where `hidden_loss` compares them.
    """

    def __init__(self, model: PreTrainedModel, config: Upcycle) -> None:
        """Raises ConfigError: as `Parent` does."""
        self.model, self.config = model, config
        self.paired = bool(config.distill) and config.teacher == "self"
        self.parent = (
            Parent(model, with_outputs=config.hidden_loss > 0, teacher=config.teacher)
            if config.distill and not self.paired
            else None
        )
        self.outputs: list[Tensor] = []

    def add(self, given: dict[str, Any], output: Any, layers: list[GatedFFN]) -> Any:
        """The model's output with the whole loss in `loss`, and in `logits` those of the sparse mode.

        Args:
            given: what the model was called with, by name.
        """
        weight, share = self.config.distill, share_of_batch(given)
        loss, ours, theirs = output.loss, output.logits, None
        if self.paired:
            (theirs, ours), labels = halves(output.logits), halves(given["labels"])[0]
            if weight < 1:
                about = {"vocab_size": ours.shape[-1], "num_items_in_batch": given.get("num_items_in_batch")}
                loss = loss + (1 - weight) * self.model.loss_function(ours, labels, **about)
            output.logits = ours
        elif self.parent is not None:
            theirs, loss = self.parent.logits(given), (1 - weight) * loss
        if theirs is not None:
            ours_NV = ours.flatten(0, 1)
            loss = loss + weight * share * divergence(ours_NV, theirs.flatten(0, 1)) / ours_NV.shape[0]
            if self.config.hidden_loss:
                loss = loss + self.config.hidden_loss * share * distance(*self._outputs_of_both())
        own = [each for layer in layers for each in layer.losses]
        if own:
            loss = loss + self.config.predictor_loss * share * torch.stack(own).mean()
        output.loss = loss
        return output

    def _outputs_of_both(self) -> tuple[list[Tensor], list[Tensor]]:
        """The FFNs' outputs: the sparse mode's, and its teacher's."""
        if self.parent is not None:
            return self.outputs, self.parent.outputs
        both = [halves(y) for y in self.outputs]
        return [sparse for _, sparse in both], [dense for dense, _ in both]


def share_of_batch(given: dict[str, Any]) -> Tensor | float:
    """What part of the optimizer step's tokens this micro-batch has, where the trainer says how many there are."""
    count, labels = given.get("num_items_in_batch"), given.get("labels")
    if count is None or labels is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / count
