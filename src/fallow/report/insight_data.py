"""What a switching run wrote about itself (`insight` in run.json) -> tidy numbers, forgiving about all that is missing.

An interrupted or an older run may lack partitions, hold one observation, or None where a layer was not looked at yet.
Each of those leaves out what depends on it and nothing else. Cost: one pass over the block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fallow.report.loading import Run, lookup, number

PHASES = ("dense", "sparse", "mixed")
SEEN = ("similarity", "zeros", "dense_loss", "sparse_loss")

Rows = list[tuple[int, list[float]]]
"""`(step, value of each layer that has one)`, steps ascending."""


@dataclass(kw_only=True, slots=True)
class Line:
    """One decision."""

    step: int
    before: str
    phase: str
    """From this step on."""
    anew: bool
    """Neurons were sorted into experts."""
    reason: str
    seen: dict[str, float | None]
    """Means over layers, and losses; what was not looked at is None."""

    @property
    def gap(self) -> float | None:
        """Nats that the loss computed sparse lies above the loss computed dense."""
        dense, sparse = self.seen["dense_loss"], self.seen["sparse_loss"]
        return None if dense is None or sparse is None else sparse - dense


@dataclass(kw_only=True, slots=True)
class Phase:
    """A stretch of the run computed one way."""

    name: str
    start: int
    end: int
    """The first step that no longer belongs to it."""

    @property
    def sparse_steps(self) -> float:
        return {"dense": 0.0, "sparse": 1.0, "mixed": 0.5}[self.name] * (self.end - self.start)


@dataclass(kw_only=True, slots=True)
class Insight:
    """One run's."""

    settings: dict[str, Any]
    """Of the method."""
    experts: dict[str, Any]
    """`experts` and `active` as the model has them."""
    lines: list[Line]
    steps: int
    """The run's, as far as it came."""
    observations: list[dict[str, Any]] = field(default_factory=list)
    partitions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def phases(self) -> list[Phase]:
        found: list[Phase] = []
        for line in self.lines:
            if not found or found[-1].name != line.phase:
                if found:
                    found[-1].end = line.step
                found.append(Phase(name=line.phase, start=line.step, end=self.steps))
        return [phase for phase in found if phase.end > phase.start]

    @property
    def sparse_share(self) -> float:
        """Share of the steps that computed only experts; of mixed ones every other."""
        return sum(phase.sparse_steps for phase in self.phases) / max(self.steps, 1)

    @property
    def active_share(self) -> float | None:
        """Share of the neurons that a sparse step computes, mean over layers."""
        experts, counts = number(self.experts, "experts"), counted(self.experts.get("active"))
        return sum(counts) / len(counts) / experts if experts and counts else None

    def threshold(self, name: str) -> float | None:
        """A setting that the adaptive schedule decides by; None under the other schedules, which do not look at it."""
        return number(self.settings, name) if self.settings.get("schedule") == "adaptive" else None

    def observed(self, name: str) -> Rows:
        return layered(self.observations, name)

    def parted(self, name: str) -> Rows:
        return layered(self.partitions, name)


def read(run: Run) -> Insight | None:
    """None where the run wrote none, or nothing that can be read."""
    block = lookup(run.info, "insight")
    if not isinstance(block, dict):
        return None
    lines = list({line.step: line for line in map(_line, _items(block, "log")) if line is not None}.values())
    lines.sort(key=lambda line: line.step)
    if not lines:
        return None
    settings = lookup(run.info, "method")
    last = max([lines[-1].step + 1, *(int(p["step"]) for p in (*run.train, *run.evals))])
    return Insight(
        settings=settings if isinstance(settings, dict) else {},
        experts={key: block.get(key) for key in ("experts", "active")},
        lines=lines,
        steps=int(number(run.info, "totals", "steps") or 0) or last,
        observations=_items(block, "observations"),
        partitions=_items(block, "partitions"),
    )


def layered(items: Iterable[dict[str, Any]], name: str) -> Rows:
    """What `items` hold per layer under `name`; those without any number are left out."""
    rows = {int(item["step"]): counted(item.get(name)) for item in items}
    return [(step, rows[step]) for step in sorted(rows) if rows[step]]


def counted(value: object) -> list[float]:
    """The finite numbers of a list, or the one that stands alone."""
    numbers = (number({"v": v}, "v") for v in (value if isinstance(value, list) else [value]))
    return [v for v in numbers if v is not None]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _items(block: dict[str, Any], name: str) -> list[dict[str, Any]]:
    items = block.get(name)
    return [i for i in items if number(i, "step") is not None] if isinstance(items, list) else []


def _line(item: dict[str, Any]) -> Line | None:
    phase = item.get("phase")
    if phase not in PHASES:
        return None
    before = item.get("before")
    return Line(
        step=int(item["step"]),
        before=before if before in PHASES else phase,
        phase=phase,
        anew=item.get("repartition") is True,
        reason=str(item.get("reason") or ""),
        seen={name: number(item, "seen", name) for name in SEEN},
    )
