"""Whether a repair may stay: held-out documents rise, at held-out lengths too, and nothing else gets worse.

Judged are documents of another seed than the diagnosis's, at its lengths and at lengths between them, by the likelihood
of the right answer; and the loss on held-out text. `sick` cells (task and length that the layer costs something) must
rise: the paired interval of the gain above zero, and no length falling on average. Every other cell and text must stay
within the interval it had before. Reading more is not forbidden, it is said: the density exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fallow.evaluation import bootstrap
from fallow.evaluation.answers import Answer
from fallow.evaluation.diagnosis import cells, nats_of
from fallow.evaluation.perplexity import TextLoss, text_loss
from fallow.evaluation.subject import Subject
from fallow.methods.upcycle.layers import GatedFFN

Cell = tuple[str, int]


@dataclass(kw_only=True, slots=True)
class Figures:
    """What is measured before and after."""

    nats: list[float]
    """Per held-out document, sparse."""
    texts: list[TextLoss] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Judge:
    """Held-out documents and texts, and which cells are to rise."""

    subject: Subject
    answers: list[Answer]
    texts: dict[str, Tensor]
    """Name -> windows, int64 [N, T]."""
    sick: set[str]
    """Tasks that the layer costs something; theirs are the cells that must rise."""

    def measure(self) -> Figures:
        """In the state the model is in now."""
        nats = nats_of(self.subject, self.answers, mode="sparse")
        texts = [text_loss(self.subject, windows, mode="sparse", name=name) for name, windows in self.texts.items()]
        return Figures(nats=nats, texts=texts)

    def verdict(self, before: Figures, after: Figures) -> dict[str, Any]:
        """`accepted`, `reasons` against it, and the figures.

        Returns:
            JSON: `accepted` (bool), `reasons` (list of sentences; empty when accepted), `gain` (interval of nats won on
            sick cells), `cells` and `texts` (before, after, whether within).
        """
        reasons: list[str] = []
        held = cells(self.answers)
        wanted = [n for (task, _), rows in held.items() if task in self.sick for n in rows]
        gain = bootstrap.difference([before.nats[n] for n in wanted], [after.nats[n] for n in wanted])
        if not gain.above_zero:
            reasons.append(f"held-out documents gain {gain.text()} nats: not above zero")
        for length in sorted({self.answers[n].length for n in wanted}):
            rows = [n for n in wanted if self.answers[n].length == length]
            won = float(np.mean([before.nats[n] - after.nats[n] for n in rows]))
            if won <= 0:
                reasons.append(f"held-out documents of {length} tokens fall by {-won:.4f} nats")
        told = []
        for (task, length), rows in held.items():
            was = bootstrap.mean([before.nats[n] for n in rows])
            now = float(np.mean([after.nats[n] for n in rows]))
            told.append(
                {"task": task, "length": length, "before": was.as_dict(), "after": now, "sick": task in self.sick}
            )
            if task not in self.sick and now > was.high:
                reasons.append(f"{task} at {length} tokens leaves its interval: {now:.4f} above {was.high:.4f} nats")
        texts = []
        for old, new in zip(before.texts, after.texts, strict=True):
            was, now = old.loss, new.loss.mean
            texts.append({"text": old.name, "before": was.as_dict(), "after": now})
            if now > was.high:
                reasons.append(f"loss on {old.name} leaves its interval: {now:.4f} above {was.high:.4f} nats")
        return {"accepted": not reasons, "reasons": reasons, "gain": gain.as_dict(), "cells": told, "texts": texts}


def density(layers: Sequence[GatedFFN]) -> float:
    """Share of FFN channels that a token computes, over all layers."""
    return sum(layer.keep * layer.view.n_channels / layer.bank for layer in layers) / sum(
        layer.view.n_channels for layer in layers
    )


def exception(layer: GatedFFN, keep_before: int, before: float, after: float) -> str:
    """The density exception in a sentence; empty where density is as it was."""
    if layer.keep == keep_before:
        return ""
    return (
        f"Density exception: layer {layer.number} keeps {layer.keep} of {layer.bank} channels instead of {keep_before},"
        f" so that the model computes {after:.1%} of its FFN channels instead of {before:.1%}."
    )
