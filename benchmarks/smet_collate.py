"""Read out of benchmarks/results/smet-pretrain.json: per arm losses, gaps, bytes, and the rise after updates."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

Data = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Summary:
    """One arm over its seeds."""

    losses: dict[int, float]
    """Final held-out loss by seed."""
    gaps: list[float]
    """Against dense of the same seed."""
    state_bytes: int
    rise: float
    """Mean loss of the ten steps after an update minus the loss just before it, on one fixed batch, less the same of
    the resting form (static, of the same density and seed) around the same steps; mean over updates and seeds."""


def summarise(data: Data) -> dict[str, Summary]:
    """Every arm that has a finished run."""
    by_arm: dict[str, dict[int, Data]] = {}
    for run in data["runs"]:
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    dense = by_arm.get("dense", {})
    return {
        arm: Summary(
            losses={seed: run["heldout"] for seed, run in runs.items()},
            gaps=[run["heldout"] - dense[seed]["heldout"] for seed, run in runs.items() if seed in dense],
            state_bytes=next(iter(runs.values()))["state_bytes"],
            rise=statistics.fmean(rise_of(run, resting(by_arm, run)) for run in runs.values()),
        )
        for arm, runs in by_arm.items()
    }


def resting(by_arm: dict[str, dict[int, Data]], run: Data) -> Data | None:
    """The static run of the same density and seed."""
    parts = run["arm"].split("-")
    percent = parts[1] if len(parts) > 1 else ""
    return by_arm.get(f"static-{percent}", {}).get(run["seed"])


def rise_of(run: Data, rest: Data | None) -> float:
    """Mean rise after an update, less that of the resting form around the same steps."""
    own = [statistics.fmean(w[2:]) - w[0] for w in run["windows"]]
    if not own:
        return 0.0
    if rest is None or len(rest["windows"]) != len(run["windows"]):
        return statistics.fmean(own)
    still = [statistics.fmean(w[2:]) - w[0] for w in rest["windows"]]
    return statistics.fmean(a - b for a, b in zip(own, still, strict=True))


def at_equal_seconds(data: Data, arm: str, step_time: float | None) -> list[float]:
    """Loss minus what dense reaches in the arm's seconds, per seed, on the line through complete dense runs of several
    lengths; empty where no dense runs of other lengths are there."""
    if step_time is None or arm == "dense":
        return []
    gaps = []
    runs = {(r["arm"], r["seed"]): r for r in data["runs"]}
    for (name, seed), run in runs.items():
        if name != arm:
            continue
        front = sorted(
            (r["steps"], r["heldout"])
            for (n, s), r in runs.items()
            if n.split("-")[0] == "dense" and s == seed and "lr" not in n
        )
        if len(front) >= 2:
            gaps.append(run["heldout"] - on_line(front, run["steps"] * step_time))
    return gaps


def on_line(points: list[tuple[float, float]], x: float) -> float:
    """Linear between the two points around x, or beyond the end through the last two."""
    after = next((i for i, (px, _) in enumerate(points) if px >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(after - 1, 0)], points[max(after, 1)]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
