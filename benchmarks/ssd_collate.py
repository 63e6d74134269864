"""Read out of benchmarks/results/ssd-pretrain.json and ssd-pace.json: losses in both modes, seconds, and the front.

A run's seconds are its steps, observations and partitions at the prices of ssd-pace.json. Dense runs of several lengths
make the front; "seconds to dense's loss" is where a line through an arm's runs of several lengths meets dense's final
loss.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from ssd_arms import ARMS, PREFIX

Data = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Summary:
    """One arm over its seeds."""

    dense: dict[int, float] = field(default_factory=dict)
    """Final held-out loss by seed, every expert computed."""
    sparse: dict[int, float] = field(default_factory=dict)
    """The same by k experts."""
    seconds: dict[int, float] = field(default_factory=dict)
    sparse_share: float = 0.0
    """Share of the steps that were sparse."""
    parameters: int = 0

    def mean(self, what: str = "dense") -> float:
        return statistics.fmean(getattr(self, what).values())


def base_of(arm: str) -> str:
    """The dense arm that an arm is compared with."""
    return f"{PREFIX[ARMS[arm].model]}dense"


def form_of(arm: str) -> tuple[str, str]:
    """(dense, sparse) forms of ssd-pace.json that an arm's steps are made of."""
    a = ARMS[arm]
    prefix = PREFIX[a.model]
    if a.native_moe:
        return f"{prefix}moe", f"{prefix}moe"
    if a.ffn_share < 1:
        return f"{prefix}small", f"{prefix}small"
    if a.ssd is None:
        return f"{prefix}dense", f"{prefix}dense"
    sparse = (
        f"{prefix}sparse-half" if "half" in arm else f"{prefix}sparse-eight" if "eight" in arm else f"{prefix}sparse"
    )
    return f"{prefix}dense", sparse


def seconds_of(run: Data, prices: dict[str, float]) -> float:
    """Of a whole run."""
    dense, sparse = form_of(run["arm"])
    total = (run["steps"] - run["sparse_steps"]) * prices[dense] + run["sparse_steps"] * prices[sparse]
    prefix = PREFIX[ARMS[run["arm"]].model]
    insight = run["insight"] or {}
    total += len(insight.get("observations", ())) * prices[f"{prefix}observation"]
    total += len(insight.get("partitions", ())) * prices[f"{prefix}partition"]
    return total / 1e3


def summarise(data: Data, pace: Data) -> dict[str, Summary]:
    """Every arm that has a finished run and whose steps have prices."""
    found: dict[str, Summary] = {}
    for run in data["runs"]:
        if not {*form_of(run["arm"])} <= {*pace["prices_ms"]}:
            continue
        s = found.setdefault(run["arm"], Summary())
        s.dense[run["seed"]] = run["heldout"]
        if run["heldout_sparse"] is not None:
            s.sparse[run["seed"]] = run["heldout_sparse"]
        s.seconds[run["seed"]] = seconds_of(run, pace["prices_ms"])
        s.sparse_share, s.parameters = run["sparse_steps"] / run["steps"], run["parameters"]
    return found


def gaps(of: dict[str, Summary], arm: str, what: str = "dense") -> list[float]:
    """Loss minus that of the arm's dense run of full length, per seed, as a share of it."""
    base = of[base_of(arm)].dense
    return [loss / base[seed] - 1 for seed, loss in getattr(of[arm], what).items() if seed in base]


def gap_at_equal_seconds(of: dict[str, Summary], arm: str) -> list[float]:
    """Loss minus what dense runs of several lengths reach in the arm's seconds, nats, per seed."""
    front = [a for a in of if a == base_of(arm) or (base_of(arm) == "dense" and a.startswith("dense-"))]
    found = []
    for seed, loss in of[arm].dense.items():
        points = sorted((of[a].seconds[seed], of[a].dense[seed]) for a in front if seed in of[a].dense)
        if len(points) >= 2:
            found.append(loss - on_line(points, of[arm].seconds[seed]))
    return found


def seconds_to_dense(of: dict[str, Summary], arms: list[str]) -> list[float]:
    """Seconds in which a form reaches dense's final loss over dense's seconds, per seed, on the line through its runs
    of several lengths (`arms`). Dense's loss is that of its best learning rate. Of a single run its whole seconds, an
    upper bound; infinity where it falls short."""
    found, base = [], of[base_of(arms[0])]
    for seed, target in best_dense(of, ARMS[arms[0]].model).items():
        points = sorted((of[a].dense[seed], of[a].seconds[seed]) for a in arms if a in of and seed in of[a].dense)
        if len(points) >= 2:
            found.append(on_line(points, target) / base.seconds[seed])
        elif points:
            found.append(points[0][1] / base.seconds[seed] if points[0][0] <= target else math.inf)
    return found


def best_dense(of: dict[str, Summary], model: str) -> dict[int, float]:
    """The lowest final loss of the model's dense runs of full length, by seed."""
    best: dict[int, float] = {}
    for name, summary in of.items():
        arm = ARMS[name]
        if arm.model == model and arm.ssd is None and not arm.native_moe and arm.ffn_share == arm.steps_scale == 1:
            for seed, loss in summary.dense.items():
                best[seed] = min(loss, best.get(seed, math.inf))
    return best


def on_line(points: list[tuple[float, float]], x: float) -> float:
    """Linear between the two points around x, or beyond the end through the last two."""
    after = next((i for i, (px, _) in enumerate(points) if px >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(after - 1, 0)], points[max(after, 1)]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
