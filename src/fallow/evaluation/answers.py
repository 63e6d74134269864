"""How likely a model finds the right answer of a RULER document: nats per answer token, teacher-forced.

A generated score is 0 or 1 for most documents, so that a gap of a few percent needs hundreds of them; the likelihood of
the answer moves with every document and costs one forward pass over the prompt, no generation. Documents go through one
at a time: padding would change what the banks of a sparse FFN see. Classes of tokens tell apart what was not found (the
first token of an answer) from what was not copied (the tokens inside it).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fallow.errors import ConfigError
from fallow.evaluation.documents import Document
from fallow.evaluation.perplexity import cross_entropy

CLASSES = ("begin", "inside", "between")
"""First token of an answer; its other tokens; what stands between answers (numbers of a list, commas)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Answer:
    """One document as tokens."""

    task: str
    length: int
    ids: Tensor
    """int64 [T]: prompt and answer."""
    wanted: int
    """How many of them, at the end, are the answer."""
    classes: tuple[str, ...]
    """Of each answer token."""


def tokenized(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
    """Prompts and answers as tokens, cut between the two. Raises ConfigError: an answer has no token."""
    return [_tokens(document, tokenizer) for document in documents]


def _tokens(document: Document, tokenizer: PreTrainedTokenizerBase) -> Answer:
    prompt: list[int] = tokenizer(document.prompt).input_ids  # type: ignore[assignment]
    given: Any = tokenizer(document.answer, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast))
    answer: list[int] = given.input_ids
    if not answer:
        raise ConfigError(f"{document.task}: the answer {document.answer!r} is no token of this tokenizer")
    spans = given["offset_mapping"] if tokenizer.is_fast else [(0, 1)] * len(answer)
    classes = _classes(document, spans) if tokenizer.is_fast else ("begin",) * len(answer)
    return Answer(
        task=document.task,
        length=document.length,
        ids=torch.tensor(prompt + answer, dtype=torch.long),
        wanted=len(answer),
        classes=classes,
    )


def _classes(document: Document, spans: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """The class of each token of the answer, from where it lies in the text."""
    starts, place = [], 0
    for output in document.outputs:
        place = document.answer.index(output, place)
        starts.append((place, place + len(output)))
        place += len(output)
    found = []
    for first, end in spans:
        inside = [(a, b) for a, b in starts if first < b and end > a]
        found.append("between" if not inside else "begin" if first <= inside[0][0] else "inside")
    return tuple(found)


def answer_nats(model: PreTrainedModel, answer: Answer) -> Tensor:
    """fp32 [wanted]: nats of each answer token after all before it."""
    ids_BT = answer.ids[None].to(model.device)
    keep: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keep["logits_to_keep"] = answer.wanted + 1
    logits_BTV = model(input_ids=ids_BT, use_cache=False, **keep).logits
    return cross_entropy(logits_BTV[:, -answer.wanted - 1 : -1], ids_BT[:, -answer.wanted :])[0].cpu()
