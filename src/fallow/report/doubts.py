"""What a careful reader would hold against the figures, found in the runs themselves and said on the page.

A comparison can be true to its numbers and still mislead: other machines, other text, one seed, a learning rate that
had not come down yet. Each check here turns one of those into a sentence; none changes a figure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fallow.report.analysis import Arm, Comparison, curve, interpolate
from fallow.report.loading import Run, lookup, number

DRIFT = 0.05
"""Two arms of the same step whose speeds differ by more than this share ran on a machine that changed (ours)."""
BUSY = 0.3
"""With more than this no verdict falls on what a time decides (ours)."""


def doubts(comparison: Comparison) -> list[str]:
    """What the reader should hold against the figures: one line each, empty when nothing is amiss."""
    lines = []
    runs = [run for arm in comparison.arms for run in arm.runs]
    questions: list[tuple[str, Callable[[Run], Any], str]] = [
        ("machine", lambda r: _machine(r), "seconds and tokens per second of different machines do not compare"),
        ("text", lambda r: lookup(r.info, "data", "digest"), "their losses do not compare"),
        ("evaluation text", lambda r: lookup(r.info, "data", "eval_tokens"), "their losses do not compare"),
        ("model", lambda r: lookup(r.info, "model", "name"), "neither their losses nor their speeds compare"),
        ("precision", lambda r: lookup(r.info, "precision", "dtype"), "part of a speed difference may come from it"),
    ]
    for what, answer, consequence in questions:
        answers = {json.dumps(value, sort_keys=True) for run in runs if (value := answer(run)) is not None}
        if len(answers) > 1:
            lines.append(f"The runs differ in their {what}: {consequence}.")
    lines += _size_doubt(comparison)
    for arm in comparison.arms:
        unfinished = [run.status for run in arm.runs if run.status != "finished"]
        if unfinished:
            lines.append(f"{arm.label} {_state(unfinished[0])}; its figures are those up to its last logged step.")
    if comparison.baseline is not None and comparison.sparse:
        unread = [
            arm.label
            for arm in comparison.sparse
            if arm.gap_seconds is None and arm.loss and comparison.baseline.loss and not arm.for_serving
        ]
        if unread:
            lines.append(
                f"Loss at equal seconds is not given for {', '.join(unread)}: the evaluations lie too far apart to "
                "read a loss between them. Set eval_every, or add a dense arm with equal_seconds_to."
            )
        lines += _drift_doubt(comparison)
        lines += _learning_rate_doubt(comparison)
        lines += _upcycling_doubts(comparison)
        if max(len(arm.runs) for arm in comparison.arms) == 1:
            lines.append("One seed per arm: gaps of about 0.01 nats or less may be chance.")
    return lines


def _size_doubt(comparison: Comparison) -> list[str]:
    """Models of one name may differ in their shape; a smaller one is a fair control, but not an equal."""
    fields = ("family", "parameters", "layers", "d_model", "ffn", "heads", "kv_heads", "vocab")
    shapes: dict[str, tuple[str, list[str]]] = {}
    for arm in comparison.arms:
        model = lookup(arm.runs[0].info, "model")
        if isinstance(model, dict):
            key = json.dumps([model.get(name) for name in fields], default=str)
            count = number(model, "parameters")
            shapes.setdefault(key, (f"{count / 1e6:,.2f} M" if count else "?", []))[1].append(arm.label)
    if len(shapes) < 2:
        return []
    found = "; ".join(f"{', '.join(labels)}: {count} parameters" for count, labels in shapes.values())
    return [
        f"The arms differ in their architecture ({found}; a sparse arm's are counted dense): neither losses nor speeds "
        "compare a method alone."
    ]


def drift(comparison: Comparison) -> float:
    """By which share the machine's pace moved between dense arms that take the same step; 0 where there are not two."""
    return max((fast / slow - 1 for (slow, _), (fast, _) in _same_step(comparison)), default=0.0)


def _same_step(comparison: Comparison) -> list[tuple[tuple[float, str], tuple[float, str]]]:
    """Slowest and fastest, (tokens/s, label), of dense arms that differ in their length alone."""
    alike = ("batch_size", "seq_len", "accumulate", "compile", "gradient_checkpointing")
    speeds: dict[str, list[tuple[float, str]]] = {}
    for arm in comparison.arms:
        if arm.method is None and arm.tokens_per_second is not None and arm.status == "finished":
            key = json.dumps([lookup(arm.runs[0].info, "recipe", name) for name in alike])
            speeds.setdefault(key, []).append((arm.tokens_per_second.mean, arm.label))
    return [(min(found), max(found)) for found in speeds.values() if min(found)[0] > 0]


def _drift_doubt(comparison: Comparison) -> list[str]:
    """What the speeds of one and the same step differ by is the machine."""
    return [
        f"{slower} and {faster} take the same step, yet ran at {slow:,.0f} and {fast:,.0f} tokens/s: the "
        f"machine's pace moved by {fast / slow - 1:.0%} between arms, and no ratio of speeds here, nor what is "
        "read at equal seconds, is surer than that."
        for (slow, slower), (fast, faster) in _same_step(comparison)
        if fast / slow > 1 + DRIFT
    ]


def _learning_rate_doubt(comparison: Comparison) -> list[str]:
    """A dense run read in mid-schedule has not had its low learning rates yet, which flatters the faster arm."""
    baseline = comparison.baseline
    if baseline is None or not baseline.runs[0].train:
        return []
    lines = baseline.runs[0].train
    racing = [arm for arm in comparison.sparse if not arm.for_serving]
    finished = [arm for arm in racing if arm.status == "finished" and arm.gap_seconds and not arm.control]
    rates = [(line["seconds"], rate) for line in lines if (rate := number(line, "lr")) is not None]
    ends = [points[-1][0] for arm in finished if (points := curve(arm.runs[0], "seconds"))]
    if not rates or not ends or min(ends) >= rates[-1][0]:
        return []
    then, last = interpolate(rates, max(min(ends), rates[0][0])), rates[-1][1]
    if then is None or then <= 1.5 * max(last, 1e-12):
        return []
    return [
        f"Equal seconds flatters a faster arm: when the first ended, {baseline.label} was still at learning rate "
        f"{then:.1e} on its way to {last:.1e}. A dense run planned for that time would do somewhat better; an arm with "
        "equal_seconds_to measures it."
    ]


def _upcycling_doubts(comparison: Comparison) -> list[str]:
    """What an upcycled arm had that its dense companion had not, and what no training run measures."""
    arms = [arm for arm in comparison.sparse if arm.for_serving]
    if not arms or comparison.baseline is None:
        return []
    base, lines = comparison.baseline.label, []
    unmeasured = [arm.label for arm in arms if arm.dense_loss is None]
    if unmeasured:
        lines.append(
            f"The loss computed sparse was not measured of {', '.join(unmeasured)}: what stands here is with all "
            "channels, and says nothing of how it is served."
        )
    lines += _teachers([arm for arm in arms if number(arm.runs[0].info, "method", "distill")], base)
    fitted = [f"{arm.label} ({fit:,.0f})" for arm in arms if (fit := number(arm.runs[0].info, "method", "fit_tokens"))]
    if fitted:
        lines.append(
            f"Equal tokens does not count what predictors were fitted on before training: {', '.join(fitted)}, all "
            "other weights frozen."
        )
    return lines


def _teachers(taught: list[Arm], base: str) -> list[str]:
    """Who else than the text taught these arms."""
    by_teacher: dict[str | None, list[str]] = {}
    for arm in taught:
        by_teacher.setdefault(lookup(arm.runs[0].info, "method", "teacher"), []).append(arm.label)
    lines = []
    for teacher, labels in by_teacher.items():
        if teacher == "self":
            lines.append(
                f"{', '.join(labels)} computed every batch in both modes, the sparse one learning from the dense one "
                f"(teacher: self): the same tokens as {base}, about twice the computation."
            )
            continue
        who = "the model as it was before training" if teacher is None else f"another model ({teacher})"
        lines.append(
            f"{', '.join(labels)} also learned from {who} (distill); {base} learned from "
            "the text alone. Part of a gap, either way, is that teacher's doing."
        )
    return lines


def _state(status: str) -> str:
    known = {"running": "is still running", "interrupted": "was interrupted", "failed": "failed before its end"}
    return known.get(status, f"has status {status}")


def _machine(run: Run) -> Any:
    machine = lookup(run.info, "machine")
    return {key: machine.get(key) for key in ("cpu", "cores", "gpus")} if isinstance(machine, dict) else None
