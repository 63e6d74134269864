"""Loss on held-out text in nats per token, and perplexity, with a bootstrap interval over windows.

A text is cut into windows of a given length, none overlapping, and each is read from an empty context: what a model of
that context length can do, at one forward pass per token. Sliding windows would give every token a full context, for
many times the work and a figure that still depends on the stride. The interval resamples windows, not tokens, because
tokens of one window fail together. Every token of a window but the first is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from fallow.errors import DataError
from fallow.evaluation import bootstrap
from fallow.evaluation.bootstrap import Interval
from fallow.evaluation.subject import Subject
from fallow.method import Mode
from fallow.training.sources import Fields, Source, find, read

ROWS = 256
"""Positions whose fp32 logits are held at a time."""


@dataclass(kw_only=True, slots=True)
class TextLoss:
    """What a text cost, window by window."""

    name: str
    length: int
    mode: Mode
    nats: list[float]
    """Sum over each window."""
    tokens: list[int]
    """Predicted tokens of each window."""

    @property
    def loss(self) -> Interval:
        """Nats per token."""
        return bootstrap.ratio(self.nats, self.tokens)

    def as_dict(self) -> dict[str, Any]:
        loss = self.loss
        return {
            "text": self.name,
            "length": self.length,
            "mode": self.mode,
            "loss": loss.as_dict(),
            "perplexity": {k: math.exp(getattr(loss, k)) for k in ("mean", "low", "high")},
            "tokens": sum(self.tokens),
        }


def gap(sparse: TextLoss, dense: TextLoss) -> Interval:
    """Sparse minus dense, nats per token, windows paired."""
    return bootstrap.ratio([a - b for a, b in zip(sparse.nats, dense.nats, strict=True)], dense.tokens)


def texts(entries: Sequence[str]) -> list[Source]:
    """Files, globs, folders, or `python-reference`. Raises DataError: an entry matches nothing."""
    return find(entries)


def windows(subject: Subject, source: Source, *, length: int, limit: int | None) -> Tensor:
    """int64 [N, length]: the first windows of one text; its documents are joined by the end-of-text token.

    Raises:
        ConfigError: the length is beyond the model's context.
        DataError: the text is shorter than one window.
    """
    subject.check_length(length, "perplexity")
    wanted = None if limit is None else length * limit
    ids = torch.tensor(_ids(subject, source, wanted), dtype=torch.long)
    count = len(ids) // length if limit is None else min(limit, len(ids) // length)
    if not count:
        raise DataError(
            f"{source.name}: {len(ids)} tokens do not fill one window of {length}; use a shorter --length or more text"
        )
    return ids[: count * length].view(count, length)


def _ids(subject: Subject, source: Source, wanted: int | None) -> list[int]:
    ids: list[int] = []
    end = subject.tokenizer.eos_token_id
    for document in read([source], Fields()):
        if ids and end is not None:
            ids.append(int(end))  # type: ignore[arg-type]  # one token, not several
        text = document["text"] if wanted is None else document["text"][: 16 * (wanted - len(ids))]
        ids += subject.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if wanted is not None and len(ids) >= wanted:
            break
    return ids


def text_loss(subject: Subject, windows_NT: Tensor, *, mode: Mode, name: str = "", batch_size: int = 1) -> TextLoss:
    """The loss of each window, computed in `mode`."""
    nats: list[float] = []
    with subject.evaluated(mode) as model:
        for rows_BT in windows_NT.split(batch_size):
            nats += token_nats(model, rows_BT.to(model.device)).sum(1).tolist()
    length = windows_NT.shape[1]
    return TextLoss(name=name, length=length, mode=mode, nats=nats, tokens=[length - 1] * len(nats))


def token_nats(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """fp32 [B, T-1]: what each token but the first cost, in nats. Logits become fp32 a few rows at a time."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return cross_entropy(logits_BTV[:, :-1], ids_BT[:, 1:])


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """fp32 [B, T] nats of the targets."""
    flat, wanted = logits_BTV.flatten(0, 1), targets_BT.flatten()
    parts: Iterable[Tensor] = (
        functional.cross_entropy(a.float(), b, reduction="none")
        for a, b in zip(flat.split(ROWS), wanted.split(ROWS), strict=True)
    )
    return torch.cat(list(parts)).view(targets_BT.shape)
