"""RULER by lm-eval, without network: six tasks at the lengths asked for, a score per document, an interval per figure.

Prompts, generation and scores are lm-eval's task objects; only their documents are given to them (`documents`), because
theirs come 500 at a time. A score is the share of a document's answers that occur in what was generated, 0 to 1. The
mean over tasks of a length weighs tasks alike and is resampled within each task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fallow.errors import ConfigError
from fallow.evaluation import bootstrap, lm_eval_door
from fallow.evaluation.bootstrap import Interval
from fallow.evaluation.documents import SEEDED, TASKS, Document, make_all
from fallow.evaluation.subject import Subject
from fallow.method import Mode

Say = Callable[[str], None]
Cell = tuple[str, int]
"""Task and length."""


@dataclass(kw_only=True, slots=True)
class Scores:
    """Scores of one mode: by task and length, one per document, documents in one order for every mode."""

    mode: Mode
    cells: dict[Cell, list[float]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.cells))

    @property
    def lengths(self) -> list[int]:
        return sorted({length for _, length in self.cells})

    def at(self, length: int) -> Interval:
        """The mean over tasks at a length."""
        return stratified([self.cells[cell] for cell in self.cells if cell[1] == length])

    def all(self) -> Interval:
        """The mean over tasks and lengths."""
        return stratified(list(self.cells.values()))


def check(subject: Subject, tasks: Sequence[str], lengths: Sequence[int]) -> None:
    """Raises ConfigError: unknown task, a length beyond the model's context, or no lm-eval."""
    lm_eval_door.check()
    for task in tasks:
        if task not in (*TASKS, SEEDED):
            raise ConfigError(f"RULER task {task!r}: offline are {', '.join((*TASKS, SEEDED))}")
    for length in lengths:
        subject.check_length(length, "RULER")


def score(
    subject: Subject, documents: Sequence[Document], *, mode: Mode, batch_size: int = 1, say: Say = lambda _: None
) -> Scores:
    """Generate and score every document in one mode."""
    from fallow.evaluation import harness

    lm = harness.FallowLM(subject, mode=mode, batch_size=batch_size)
    found = Scores(mode=mode)
    for task in dict.fromkeys(document.task for document in documents):
        chosen = [document for document in documents if document.task == task]
        samples = harness.evaluate(lm, {task: _task(task, chosen)})[task]
        values = harness.per_document(samples, lambda s: s[str(s["doc"]["max_length"])])
        for document, value in zip(chosen, values, strict=True):
            found.cells.setdefault((task, document.length), []).append(value)
        say(f"{task} {mode}: {sum(values) / len(values):.3f} on {len(values)} documents")
    return found


def run(
    subject: Subject,
    *,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int],
    count: int,
    seed: int = 0,
    modes: Sequence[Mode] = ("dense",),
    batch_size: int = 1,
    say: Say = lambda _: None,
) -> list[Scores]:
    """`count` documents of each task and length, in each mode.

    Raises:
        ConfigError: as `check`, or a length too short for a task.
    """
    check(subject, tasks, lengths)
    documents = make_all(tasks, lengths, count=count, seed=seed, tokenizer=subject.tokenizer)
    return [score(subject, documents, mode=mode, batch_size=batch_size, say=say) for mode in modes]


def stratified(groups: Sequence[Sequence[float]], *, level: float = 0.95) -> Interval:
    """The mean of the groups' means, each group resampled by itself."""
    means = np.stack(
        [np.asarray(g, dtype=np.float64)[_draws(len(g), place)].mean(1) for place, g in enumerate(groups)]
    ).mean(0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean([np.mean(g) for g in groups]))
    return Interval(mean=mean, low=float(low), high=float(high), samples=sum(map(len, groups)), level=level)


def _draws(count: int, place: int) -> np.ndarray:
    """As `bootstrap.resample`, other draws for each group."""
    return np.random.default_rng((count, place)).integers(count, size=(bootstrap.DRAWS, count))


def difference(a: Scores, b: Scores, *, length: int | None = None) -> Interval:
    """Mean over tasks of `a` minus `b`, documents paired; at one length or at all."""
    cells = [cell for cell in a.cells if length is None or cell[1] == length]
    return stratified([[x - y for x, y in zip(a.cells[c], b.cells[c], strict=True)] for c in cells])


def as_dict(scores: Scores) -> dict[str, Any]:
    """Every figure with its interval, and the documents' scores."""
    return {
        "mode": scores.mode,
        "mean": scores.all().as_dict(),
        "by_length": {str(length): scores.at(length).as_dict() for length in scores.lengths},
        "cells": [
            {"task": task, "length": length, "score": bootstrap.mean(values).as_dict(), "scores": values}
            for (task, length), values in scores.cells.items()
        ],
    }


def _task(task: str, documents: Sequence[Document]) -> Any:
    """lm-eval's task object with these documents instead of its own."""
    import datasets

    name = "ruler_cwe" if task == SEEDED else task
    lm_eval_door.module("tasks.ruler.niah_utils")
    lm_tasks = lm_eval_door.module("tasks")
    folder = Path(str(lm_tasks.__file__)).parent / "ruler"
    rows = [document.row() for document in documents]

    def given(**_: Any) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(rows)}

    with lm_eval_door.silence():
        manager = lm_tasks.TaskManager(include_path=str(folder), include_defaults=False)
        loaded = manager.load([{"group": "fallow", "task": [{"task": name, "custom_dataset": given}]}])
    return loaded["tasks"][name]
