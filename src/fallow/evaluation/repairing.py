"""Mends one layer: repairs in order of cost, each judged on what it did not learn from, the first that is enough kept.

What there is to win is what the layer dense would bring back on the documents of the diagnosis. A repair is enough when
it brings back `target` of that, and is accepted by the rule of `accepting`; otherwise the layer is put back bit for bit
and the next is tried. If none is enough, the best of the accepted ones stays, and the record says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fallow import machine
from fallow.errors import ConfigError
from fallow.evaluation import bootstrap, perplexity, ruler
from fallow.evaluation.accepting import Figures, Judge, density, exception
from fallow.evaluation.answers import Answer, tokenized
from fallow.evaluation.causes import larger_keeps
from fallow.evaluation.diagnosis import ALPHA, cells, nats_of
from fallow.evaluation.documents import SEEDED, TASKS, make_all
from fallow.evaluation.repairs import NAMES, Snapshot, Workshop, ways
from fallow.evaluation.subject import Subject
from fallow.evaluation.sweeps import Say, upcycled

HELD_OUT_SEED = 7919
"""Added to the diagnosis's seed for the documents that judge."""


@dataclass(kw_only=True, slots=True)
class Asked:
    """How to repair."""

    data: list[str]
    """Plain text to learn from."""
    held_data: list[str]
    """Plain text that judges."""
    tasks: tuple[str, ...] = (SEEDED, *TASKS[1:])
    lengths: tuple[int, ...] = (1024, 2048)
    held_lengths: tuple[int, ...] = ()
    """Lengths that only judge; none: one between each two of `lengths`, or a quarter above a single one."""
    documents: int = 8
    """Per task and length."""
    seed: int = 0
    target: float = 0.8
    """Share of what a dense layer brings back that is enough."""
    repairs: tuple[str, ...] = NAMES
    tokens: int = 16384
    """Of text to learn from."""
    steps: int = 100
    lr: float = 1e-4

    def __post_init__(self) -> None:
        if not self.data or not self.held_data:
            raise ConfigError("repair: name --data, plain text to learn from, and --held-data, other text that judges")
        if not 0 < self.target <= 1:
            raise ConfigError(f"repair: --target {self.target} must lie above 0 and not above 1")
        if self.documents < 4:
            raise ConfigError(f"repair: --documents {self.documents}: an interval needs at least 4")
        if unknown := [name for name in self.repairs if name not in NAMES]:
            raise ConfigError(f"repair: --repairs {unknown[0]}: known are {', '.join(NAMES)}")
        if self.steps < 1 or self.tokens < 512:
            raise ConfigError("repair: --steps must be at least 1 and --tokens at least 512")

    def between(self) -> tuple[int, ...]:
        """Lengths that only judge."""
        if self.held_lengths:
            return self.held_lengths
        ordered = sorted(self.lengths)
        if len(ordered) == 1:
            return (ordered[0] * 5 // 4,)
        return tuple((a + b) // 2 for a, b in pairwise(ordered))


@dataclass(kw_only=True, slots=True)
class Documents:
    """What a repair is measured on."""

    answers: list[Answer]
    """Of the diagnosis: says what there is to win, and which repair is worth judging."""
    held: list[Answer]
    """Of another seed and at other lengths too: judges."""
    texts: dict[str, torch.Tensor] = field(default_factory=dict)
    """Held-out text."""


def repair(subject: Subject, place: int, asked: Asked, *, say: Say = lambda _: None) -> dict[str, Any]:
    """Repair layer `place` of the subject, in place; RULER's documents only measure.

    Returns:
        The record, as JSON: `tries`, `accepted` (the repair that stayed, or None), `recovered`, `changed`, `summary`, …

    Raises:
        ConfigError: no such layer, no predictors, a length beyond the context, or nothing to win in that layer.
        DataError: no text, or too little.
    """
    handle = upcycled(subject, "repair")
    _check_layer(place, len(handle.layers))
    lengths = tuple(sorted({*asked.lengths, *asked.between()}))
    ruler.check(subject, asked.tasks, lengths)
    longest = max(asked.lengths)
    learnt = _windows(subject, asked.data, length=longest, tokens=asked.tokens)
    texts = {
        source.name: perplexity.windows(subject, source, length=min(longest, 1024), limit=32)
        for source in perplexity.texts(asked.held_data)
    }
    tokenizer, count = subject.tokenizer, asked.documents
    made = make_all(asked.tasks, asked.lengths, count=count, seed=asked.seed, tokenizer=tokenizer)
    held = make_all(asked.tasks, lengths, count=count, seed=asked.seed + HELD_OUT_SEED, tokenizer=tokenizer)
    documents = Documents(answers=tokenized(made, tokenizer), held=tokenized(held, tokenizer), texts=texts)
    return repair_layer(subject, place, documents, learnt, asked, say=say)


def repair_layer(
    subject: Subject,
    place: int,
    documents: Documents,
    learnt_NT: torch.Tensor,
    asked: Asked,
    *,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """The same with given documents and text."""
    began = time.monotonic()
    layers = upcycled(subject, "repair").layers
    _check_layer(place, len(layers))
    layer = layers[place]
    now = nats_of(subject, documents.answers, mode="sparse")
    whole = nats_of(subject, documents.answers, mode="sparse", dense_layer=place)
    sick = _sick(documents.answers, now, whole)
    if not sick:
        raise ConfigError(
            f"repair: with layer {place} dense no task and length gains anything beyond chance, so there is nothing to"
            " repair in it; run fallow diagnose to find the layer"
        )
    say(f"layer {place}: {_gain(now, whole, documents.answers, sick):.4f} nats to win on {', '.join(sorted(sick))}")
    judge = Judge(subject=subject, answers=documents.held, texts=documents.texts, sick=sick)
    before = judge.measure()
    original, density_before = Snapshot(layer), density(layers)
    shop = Workshop(subject=subject, place=place, windows_NT=learnt_NT, steps=asked.steps, lr=asked.lr, seed=asked.seed)
    recall_before = shop.recall()
    tries: list[dict[str, Any]] = []
    best: tuple[float, Snapshot, dict[str, Any]] | None = None
    for way in ways(layer, asked.repairs, larger_keeps(layer)):
        start = time.monotonic()
        told: dict[str, Any] = {"name": way.name, "what": way.what, "recovered": None, "outcome": "skipped"}
        tries.append(told)
        if way.refused:
            told["reason"] = way.refused
            continue
        way.run(shop)
        after = nats_of(subject, documents.answers, mode="sparse")
        won = _gain(now, after, documents.answers, sick) / _gain(now, whole, documents.answers, sick)
        told |= {"recovered": won, "recall": shop.recall(), "density": density(layers), "changed": original.changes()}
        found = _judged(judge, before, told, won, best)
        told["seconds"] = time.monotonic() - start
        say(f"{way.what}: {won:.0%} back, {told['outcome']}{'; ' + told['reason'] if told['reason'] else ''}")
        if told["outcome"] in ("accepted", "partial") and (best is None or won > best[0]):
            best = won, Snapshot(layer), told | {"held_out": found}
        if won >= asked.target and told["outcome"] == "accepted":
            break
        if told["outcome"] == "accepted":
            told["outcome"], told["reason"] = "partial", f"less than {asked.target:.0%}"
        original.restore()
    kept = best[2] if best else None
    if best:
        best[1].restore()
    after_density = density(layers)
    record = {
        "kind": "repair",
        "model": subject.about,
        "layer": place,
        "sick": sorted(sick),
        "to_win": _gain(now, whole, documents.answers, sick),
        "recall": {"before": recall_before, "after": shop.recall()},
        "tries": tries,
        "accepted": kept["what"] if kept else None,
        "enough": bool(kept and kept["recovered"] >= asked.target),
        "recovered": kept["recovered"] if kept else 0.0,
        "held_out": kept["held_out"] if kept else None,
        "changed": original.changes(),
        "density": {
            "before": density_before,
            "after": after_density,
            "exception": exception(layer, original.keep, density_before, after_density),
        },
        "asked": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(asked).items()},
        "seconds": time.monotonic() - began,
        "machine": machine.describe(),
    }
    record["summary"] = summary(record)
    return record


def _judged(
    judge: Judge,
    before: Figures,
    told: dict[str, Any],
    won: float,
    best: tuple[float, Snapshot, dict[str, Any]] | None,
) -> dict[str, Any] | None:
    """Fill in `outcome` and `reason`; held-out documents are only read where the repair could be kept."""
    if won <= 0:
        told |= {"outcome": "refused", "reason": "nothing comes back"}
        return None
    if best is not None and won <= best[0]:
        told |= {"outcome": "refused", "reason": "a cheaper repair brings back more"}
        return None
    found = judge.verdict(before, judge.measure())
    told |= {"outcome": "accepted" if found["accepted"] else "refused", "reason": "; ".join(found["reasons"])}
    return found


def _sick(answers: Sequence[Answer], now: Sequence[float], whole: Sequence[float]) -> set[str]:
    """Tasks of which some length gains by the layer being dense, beyond chance."""
    held = cells(answers)
    level = 1 - ALPHA / len(held)
    return {
        task
        for (task, _), rows in held.items()
        if bootstrap.difference([now[n] for n in rows], [whole[n] for n in rows], level=level).above_zero
    }


def _gain(now: Sequence[float], then: Sequence[float], answers: Sequence[Answer], sick: set[str]) -> float:
    """Nats won over the documents of sick tasks."""
    return float(np.mean([a - b for a, b, x in zip(now, then, answers, strict=True) if x.task in sick]))


def _check_layer(place: int, count: int) -> None:
    if not 0 <= place < count:
        raise ConfigError(f"repair: there is no layer {place}; the model has layers 0 to {count - 1}")


def _windows(subject: Subject, entries: Sequence[str], *, length: int, tokens: int) -> torch.Tensor:
    """int64 [N, length]: text to learn from, from every source in equal parts."""
    sources = perplexity.texts(entries)
    each = max(1, -(-tokens // (length * len(sources))))
    return torch.cat([perplexity.windows(subject, source, length=length, limit=each) for source in sources])


def summary(record: dict[str, Any]) -> str:
    """What was done, in a few sentences."""
    if record["accepted"] is None:
        return (
            f"Layer {record['layer']} was left as it was: none of {len(record['tries'])} repairs was accepted, of"
            f" {record['to_win']:.3f} nats to win."
        )
    gain = record["held_out"]["gain"]
    enough = "" if record["enough"] else " That is less than was asked for."
    text = (
        f"Layer {record['layer']}: {record['accepted']} brings back {record['recovered']:.0%} of what a dense layer"
        f" would, and {gain['mean']:+.3f} nats [{gain['low']:+.3f}, {gain['high']:+.3f}] on held-out documents; every"
        f" other task and text stays within its interval.{enough}"
    )
    return f"{text} {record['density']['exception']}".strip()
