"""What the runs say about each other: arms, repeats, and gaps to the dense baseline.

Two gaps matter. At *equal tokens* both arms have read the same text, so the gap is what sparsity does to learning; at
*equal seconds* both have had the same time, so it is what sparsity is worth. Comparing final losses, the obvious
reading, gives only the first and only when both arms ran to the end. Losses between two evaluations are read off the
straight line between them. Runs that differ in nothing but their seed are one arm, shown as mean and range.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fallow.report.loading import SERVED_SPARSE, Loaded, Run, lookup, number

SAME_LOSS = 0.002
"""Nats: two losses closer than this are called the same (ours: about the evaluation noise of one seed)."""
WIDEST_READING = 0.25
"""A loss is read between two evaluations only when they lie within this share of the run (ours): loss curves sag, so a
long straight line lies above them, and reading the dense run too high would flatter the arm it is compared with."""
_SEED_SUFFIX = re.compile(r"[-_.](?:s|seed)[-_]?\d+$")
_NOT_SETTINGS = {"seed", "run", "arm", "name", "out", "output", "output_dir", "runs"}


@dataclass(kw_only=True, slots=True)
class Spread:
    """One figure over the repeats of an arm."""

    values: list[float]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


@dataclass(kw_only=True, slots=True)
class Arm:
    """One arm: a run, or several that differ in their seed alone. Figures that no run holds are None."""

    name: str
    label: str
    """How the page calls it."""
    runs: list[Run]
    method: str | None
    tokens_per_second: Spread | None
    """Over the whole training, evaluation and checkpoints left out."""
    loss: Spread | None
    """Evaluation loss at the end, nats per token, computed as the model will be served."""
    peak_memory_mb: Spread | None
    train_seconds: Spread | None
    tokens: Spread | None
    sparse_loss: Spread | None = None
    """The loss computed sparse, of a model that can be served both ways."""
    dense_loss: Spread | None = None
    """The loss computed dense, of a model that is made to be served sparse: there `loss` is `sparse_loss`."""
    state_bytes: Spread | None = None
    """Bytes of the model's state in an optimizer step: weights, gradients, optimizer, topology."""
    ratio: Spread | None = None
    """Tokens per second over the baseline's."""
    gap_tokens: Spread | None = None
    """Loss minus the baseline's at equal tokens, nats; negative is better than dense."""
    gap_seconds: Spread | None = None
    """The same at equal seconds."""
    control: str | None = None
    """The dense arm, planned for this arm's seconds, that `gap_seconds` is measured against; None: the baseline."""

    @property
    def status(self) -> str:
        """`finished` only when every repeat is."""
        return next((run.status for run in self.runs if run.status != "finished"), "finished")

    @property
    def for_serving(self) -> bool:
        """Made to be served sparse: what it gains is not in training, so no race against seconds judges it."""
        return self.method in SERVED_SPARSE

    @property
    def aside(self) -> bool:
        """A control that nothing serves: channels chosen by chance, by the answer itself, or by a threshold."""
        return self.for_serving and lookup(self.runs[0].info, "method", "selection") not in (None, "predictor")


@dataclass(kw_only=True, slots=True)
class Comparison:
    """All arms and the one the others are measured against."""

    arms: list[Arm]
    baseline: Arm | None

    @property
    def sparse(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.method is not None]


def compare(loaded: Loaded) -> Comparison:
    """Group the runs into arms and measure each against the dense baseline."""
    arms = [_arm(name, runs) for name, runs in _grouped(loaded.runs)]
    baseline = _baseline(arms, loaded.baseline)
    if baseline is not None:
        for arm in arms:
            if arm is not baseline:
                arm.ratio = _paired(arm, baseline, _speed_ratio)
                arm.gap_tokens = _paired(arm, baseline, lambda a, b: gap(a, b, axis="tokens"))
                planned = _planned_for(arm, arms) if arm.method is not None else None
                if planned is not None:
                    arm.control = planned.label
                    arm.gap_seconds = _paired(arm, planned, lambda a, b: a.evals[-1]["loss"] - b.evals[-1]["loss"])
                else:
                    arm.gap_seconds = _paired(arm, baseline, lambda a, b: gap(a, b, axis="seconds"))
    return Comparison(arms=arms, baseline=baseline)


def curve(run: Run, axis: str) -> list[tuple[float, float]]:
    """Evaluation loss against `"tokens"` or `"seconds"`, x ascending."""
    return sorted((point[axis], point["loss"]) for point in run.evals)


def interpolate(points: Sequence[tuple[float, float]], x: float, *, widest: float = 1.0) -> float | None:
    """The height at `x` of the line through `points` (x ascending); None outside their range, or where the points on
    both sides of `x` are further apart than the share `widest` of that range."""
    for at, height in points:
        if at == x:
            return height
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < x < x1:
            near = x1 - x0 <= widest * (points[-1][0] - points[0][0])
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if near else None
    return None


def gap(run: Run, baseline: Run, *, axis: str) -> float | None:
    """`run`'s evaluation loss minus `baseline`'s at the last `axis` value both reached; None if unreadable."""
    ours, theirs = curve(run, axis), curve(baseline, axis)
    if len(ours) < 2 or len(theirs) < 2:
        return None
    x = min(ours[-1][0], theirs[-1][0])
    a, b = interpolate(ours, x, widest=WIDEST_READING), interpolate(theirs, x, widest=WIDEST_READING)
    return None if a is None or b is None else a - b


def seconds_to_loss(run: Run, loss: float) -> float | None:
    """Training seconds after which the evaluation loss first was at or below `loss`, None if never."""
    points = curve(run, "seconds")
    if points and points[0][1] <= loss:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= loss < y0:
            return x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return None


def seed_of(run: Run) -> float | None:
    return number(run.info, "recipe", "seed")


def _settings(value: Any) -> Any:
    """A recipe without seeds and names, so that repeats look alike."""
    if isinstance(value, dict):
        return {key: _settings(item) for key, item in value.items() if key not in _NOT_SETTINGS}
    return value


def _grouped(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that differ in their seed alone, together: told by an `-s0` suffix, or by equal settings and other seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        stem = _SEED_SUFFIX.sub("", run.arm)
        method = json.dumps(_settings(run.info.get("method")), sort_keys=True)
        if stem != run.arm:
            key = f"{stem} {method}"
        elif seed_of(run) is not None:
            key = f"{method} {json.dumps(_settings(run.info.get('recipe')), sort_keys=True)}"
        else:
            key = str(run.path)
        group = groups.setdefault(key, [])
        if stem == run.arm and any(seed_of(other) == seed_of(run) for other in group):
            group = groups.setdefault(f"{key} {run.path}", [])
        group.append(run)
    named = [(_SEED_SUFFIX.sub("", group[0].arm), group) for group in groups.values()]
    names = [name for name, _ in named]
    return [
        (name if names.count(name) == 1 else f"{group[0].path.resolve().parent.name}/{name}", group)
        for name, group in named
    ]


def _arm(name: str, runs: list[Run]) -> Arm:
    return Arm(
        name=name,
        label=method_label(name) if name in ("sat", "smet", "ssd", "upcycle") else name,
        runs=runs,
        method=runs[0].method,
        tokens_per_second=_spread(speed(run) for run in runs),
        loss=_spread(run.evals[-1]["loss"] if run.evals else number(run.info, "eval", "after", "loss") for run in runs),
        peak_memory_mb=_spread(_peak(run) for run in runs),
        train_seconds=_spread(_last(run, "train_seconds", "seconds") for run in runs),
        tokens=_spread(_last(run, "tokens", "tokens") for run in runs),
        sparse_loss=_spread(number(run.info, "eval", "after", "sparse_loss") for run in runs),
        dense_loss=_spread(run.evals[-1]["dense_loss"] for run in runs if run.served_sparse),
        state_bytes=_spread(number(run.info, "memory", "total") or None for run in runs),
    )


def method_label(name: str) -> str:
    """How the page writes a method: acronyms in capitals."""
    return "Upcycle" if name == "upcycle" else name.upper()


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(values=known) if known else None


def _last(run: Run, total: str, key: str) -> float | None:
    """A total of run.json, or the last logged value of a run that has not written its totals."""
    value = number(run.info, "totals", total)
    return value if value else (float(run.train[-1][key]) if run.train else None)


def speed(run: Run) -> float | None:
    """Trained tokens per training second over the whole run."""
    tokens, seconds = _last(run, "tokens", "tokens"), _last(run, "train_seconds", "seconds")
    return tokens / seconds if tokens and seconds else number(run.info, "totals", "tokens_per_second")


def _peak(run: Run) -> float | None:
    logged = [value for line in run.train if (value := number(line, "memory_mb")) is not None]
    return number(run.info, "totals", "peak_memory_mb") or max(logged, default=None)


def _baseline(arms: list[Arm], named: str | None) -> Arm | None:
    if named is not None:
        stem = _SEED_SUFFIX.sub("", named)
        for arm in arms:
            if arm.name in (named, stem) or any(run.arm == named for run in arm.runs):
                return arm
    dense = [arm for arm in arms if arm.method is None and any(run.info for run in arm.runs)]
    dense = [arm for arm in dense if not lookup(arm.runs[0].info, "recipe", "equal_seconds_to")] or dense
    return next((arm for arm in dense if arm.name == "dense"), dense[0] if dense else None)


def _planned_for(arm: Arm, arms: Iterable[Arm]) -> Arm | None:
    """The finished dense arm whose recipe asked for `arm`'s seconds: its learning rate came down in time too."""
    names = {arm.name, *(run.arm for run in arm.runs)}
    for other in arms:
        asked = {lookup(run.info, "recipe", "equal_seconds_to") for run in other.runs}
        if other.method is None and asked & names and {arm.status, other.status} == {"finished"}:
            return other if all(run.evals for run in (*arm.runs, *other.runs)) else None
    return None


def _speed_ratio(run: Run, baseline: Run) -> float | None:
    ours, theirs = speed(run), speed(baseline)
    return ours / theirs if ours and theirs else None


def _paired(arm: Arm, baseline: Arm, figure: Callable[[Run, Run], float | None]) -> Spread | None:
    """`figure` of each repeat against the baseline of the same seed, or against the mean of all where there is none."""
    values: list[float | None] = []
    for run in arm.runs:
        same = [other for other in baseline.runs if seed_of(other) == seed_of(run)] or baseline.runs
        each = _spread(figure(run, other) for other in same)
        values.append(each.mean if each else None)
    return _spread(values)
