"""Evaluates a subject in both modes and puts the figures side by side, as JSON: what `fallow evaluate` prints.

One row per figure: the mean of each mode with its interval, and their difference in pairs. The same document in both
modes, the same order, so the difference's interval is narrower than either's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fallow import machine
from fallow.errors import ConfigError
from fallow.evaluation import bootstrap, perplexity, ruler
from fallow.evaluation.bootstrap import Interval
from fallow.evaluation.documents import SEEDED, TASKS
from fallow.evaluation.subject import Subject
from fallow.method import Mode

Say = Callable[[str], None]


@dataclass(kw_only=True, slots=True)
class Asked:
    """What to evaluate."""

    tasks: list[str]
    """`ruler` (all offline tasks), single tasks of it, `perplexity`, and names of lm-eval's tasks."""
    lengths: list[int]
    """Tokens: of RULER's documents, and of the windows that perplexity reads."""
    data: list[str]
    """Texts for perplexity: files, globs, folders."""
    limit: int | None = None
    """RULER documents per task and length (None: 50); windows per text and documents per lm-eval task (None: all)."""
    seed: int = 0
    """Of RULER's documents."""
    batch_size: int = 1

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("evaluate: name --tasks, such as ruler or perplexity")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit} must be at least 1")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size} must be at least 1")
        if "perplexity" in self.tasks and not self.data:
            raise ConfigError("evaluate: perplexity needs text; name files with --data")

    @property
    def of_ruler(self) -> list[str]:
        found = [t for task in self.tasks for t in (TASKS if task == "ruler" else (task,)) if t in (*TASKS, SEEDED)]
        return list(dict.fromkeys(found))

    @property
    def of_lm_eval(self) -> list[str]:
        ours = ("ruler", "perplexity", *TASKS, SEEDED)
        return list(dict.fromkeys(task for task in self.tasks if task not in ours))


RULER_DOCUMENTS = 50
"""Per task and length where no limit is given."""


def evaluate(subject: Subject, asked: Asked, modes: Sequence[Mode], say: Say = lambda _: None) -> dict[str, Any]:
    """Everything asked for, in these modes; anything that cannot be done is refused before anything is computed.

    Raises:
        ConfigError: unknown task, a length beyond the model's context, no lm-eval, or a mode the model has not.
        DataError: text or a task's data cannot be read.
    """
    began = time.monotonic()
    for mode in modes:
        with subject.evaluated(mode):
            pass
    for length in asked.lengths:
        subject.check_length(length, "--lengths")
    if asked.of_ruler:
        ruler.check(subject, asked.of_ruler, asked.lengths)
    lm_tasks = {}
    if asked.of_lm_eval:
        from fallow.evaluation import harness

        lm_tasks = harness.load_tasks(asked.of_lm_eval)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"model": subject.about, "modes": list(modes), "rows": rows, "seed": asked.seed}
    if "perplexity" in asked.tasks:
        rows += _perplexity(subject, asked, modes, say)
    if asked.of_ruler:
        made, result["ruler"] = _ruler(subject, asked, modes, say)
        rows += made
    if lm_tasks:
        rows += _lm_eval(subject, asked, modes, lm_tasks, say)
    return result | {"seconds": time.monotonic() - began, "machine": machine.describe()}


def _row(name: str, by_mode: dict[str, Interval], difference: Interval | None, **about: Any) -> dict[str, Any]:
    figures = {mode: interval.as_dict() for mode, interval in by_mode.items()}
    return {"name": name} | about | figures | {"difference": None if difference is None else difference.as_dict()}


def _perplexity(subject: Subject, asked: Asked, modes: Sequence[Mode], say: Say) -> list[dict[str, Any]]:
    rows = []
    for source in perplexity.texts(asked.data):
        for length in asked.lengths:
            windows_NT = perplexity.windows(subject, source, length=length, limit=asked.limit)
            found = {}
            for mode in modes:
                kept = perplexity.text_loss(
                    subject, windows_NT, mode=mode, name=source.name, batch_size=asked.batch_size
                )
                found[mode] = kept
                say(f"{source.name} at {length}, {mode}: {kept.loss.mean:.4f} nats per token")
            gap = perplexity.gap(found["sparse"], found["dense"]) if len(found) > 1 else None
            losses = {mode: kept.loss for mode, kept in found.items()}
            extra = {f"perplexity_{mode}": kept.as_dict()["perplexity"]["mean"] for mode, kept in found.items()}
            about = {"kind": "loss", "text": source.name, "length": length, "tokens": sum(found[modes[0]].tokens)}
            rows.append(_row(f"loss {_short(source.name)} {length}", losses, gap, **about, **extra))
    return rows


def _ruler(
    subject: Subject, asked: Asked, modes: Sequence[Mode], say: Say
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    scores = ruler.run(
        subject,
        tasks=asked.of_ruler,
        lengths=asked.lengths,
        count=asked.limit or RULER_DOCUMENTS,
        seed=asked.seed,
        modes=modes,
        batch_size=asked.batch_size,
        say=say,
    )
    pair = (scores[-1], scores[0]) if len(scores) > 1 else None
    rows = []
    for task, length in scores[0].cells:
        by_mode = {s.mode: bootstrap.mean(s.cells[task, length]) for s in scores}
        difference = bootstrap.difference(pair[0].cells[task, length], pair[1].cells[task, length]) if pair else None
        rows.append(_row(f"{task} {length}", by_mode, difference, kind="score", task=task, length=length))
    for length in scores[0].lengths:
        difference = ruler.difference(*pair, length=length) if pair else None
        by_mode = {s.mode: s.at(length) for s in scores}
        rows.append(_row(f"ruler mean {length}", by_mode, difference, kind="score", task="mean", length=length))
    if len(scores[0].lengths) > 1:
        difference = ruler.difference(*pair) if pair else None
        rows.append(_row("ruler mean", {s.mode: s.all() for s in scores}, difference, kind="score", task="mean"))
    return rows, {s.mode: ruler.as_dict(s) for s in scores}


def _lm_eval(
    subject: Subject, asked: Asked, modes: Sequence[Mode], tasks: dict[str, Any], say: Say
) -> list[dict[str, Any]]:
    from fallow.evaluation import harness

    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for mode in modes:
        lm = harness.FallowLM(subject, mode=mode, batch_size=asked.batch_size)
        for task in tasks:
            samples = harness.evaluate(lm, {task: tasks[task]}, limit=asked.limit)[task]
            for metric, filtered in dict.fromkeys((m, s["filter"]) for s in samples for m in s["metrics"]):
                chosen = [s for s in samples if s["filter"] == filtered and isinstance(s[metric], int | float | bool)]
                if chosen:
                    name = metric if filtered == "none" else f"{metric},{filtered}"
                    values.setdefault((task, name), {})[mode] = harness.per_document(chosen, lambda s, m=metric: s[m])
            say(f"{task} {mode}: {len(samples)} documents")
    rows = []
    for (task, metric), found in values.items():
        difference = bootstrap.difference(found["sparse"], found["dense"]) if len(found) > 1 else None
        by_mode = {mode: bootstrap.mean(kept) for mode, kept in found.items()}
        rows.append(_row(f"{task} {metric}", by_mode, difference, kind="lm-eval", task=task, metric=metric))
    return rows


def _short(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]
