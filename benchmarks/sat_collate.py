"""One JSON of an experiment from its run folders: every run, and one row per arm over its seeds.

Seconds: where `sat_pace.py` has timed the arms interleaved (pace.json beside the run folders), a run's seconds are its
steps at that pace, its ladder included, because arms that ran minutes apart on a shared machine compare the machine as
well. Each run's own clock is kept as `wall_seconds`. `clock` of the JSON says which one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fallow.errors import DataError
from fallow.methods.sat.schedule import ladder_factor
from fallow.report import svg
from fallow.report.analysis import WIDEST_READING, interpolate
from fallow.report.loading import Run, load
from fallow.training.settings import load_file

RECIPES = Path(__file__).resolve().parent / "recipes"
CURVE_POINTS = 60
"""Points kept of each curve of training losses."""

_PER_ARM = (
    "name",
    "output",
    "seed",
    "steps",
    "eval_every",
    "method",
    "method_settings",
    "arms",
    "train_data",
    "eval_data",
)

Record = dict[str, Any]


def collate(name: str, folder: Path) -> Record:
    """The JSON of one experiment from its run folders; unfinished runs are left out.

    Raises:
        DataError: no run of `folder` is finished.
    """
    runs = [run for run in load([folder]).runs if run.status == "finished"]
    if not runs:
        raise DataError(f"{folder}: no run is finished yet; nothing to collate")
    pace = json.loads((folder / "pace.json").read_text()) if (folder / "pace.json").exists() else None
    if pace is not None and not {_form(run) for run in runs} <= set(pace["forms"]):
        pace = None
    records = [_record(run, pace) for run in runs]
    order = list(load_file(RECIPES / f"{name}.yaml")["arms"])
    whole = runs[0].info
    records.sort(key=lambda r: (order.index(r["arm"]) if r["arm"] in order else len(order), r["arm"], r["seed"]))
    return {
        "experiment": name,
        "clock": "interleaved" if pace else "wall",
        "pace": pace,
        "recipe": {k: v for k, v in whole["recipe"].items() if k not in _PER_ARM} | {"steps": _full_steps(runs)},
        "model": whole.get("model"),
        "machine": whole.get("machine"),
        "versions": whole.get("versions"),
        "elsewhere": _elsewhere(runs, whole),
        "precision": whole.get("precision"),
        "runs": records,
        "summary": summarise(records),
    }


def _elsewhere(runs: Sequence[Run], first: Record) -> dict[str, Record]:
    """Runs made on another machine or with other versions than the one named: a result must say so."""
    keys = ("machine", "versions")
    return {r.arm: {k: r.info.get(k) for k in keys} for r in runs if any(r.info.get(k) != first.get(k) for k in keys)}


def _form(run: Run) -> str:
    """The arm as pace.json names it: every dense run takes the same step."""
    return "dense" if run.info.get("method") is None else run.arm.removesuffix(f"-s{run.info['recipe']['seed']}")


def _full_steps(runs: Sequence[Run]) -> int:
    return max(int(run.info["recipe"]["steps"]) for run in runs)


def paced(run: Run, pace: Record, steps: int) -> float:
    """Seconds of the first `steps` steps at the interleaved pace; on the ladder, between dense and the full rate in
    proportion to the rate."""
    dense = pace["forms"]["dense"]["ms_per_step"] / 1e3
    form = dense / pace["forms"][_form(run)]["ratio"]  # the paired ratio: medians of different moments drift apart
    method = run.info.get("method") or {}
    total = int(run.info["recipe"]["steps"])
    rungs, share = method.get("ladder", 0), method.get("dense_share", 0.0)
    factors = (ladder_factor(s, total, rungs=rungs, rung_share=share) for s in range(steps))
    return sum(dense + f * (form - dense) for f in factors)


def _record(run: Run, pace: Record | None) -> Record:
    info = run.info
    seed = int(info["recipe"]["seed"])
    suffix = f"-s{seed}"

    def clock(step: int, wall: float) -> float:
        return wall if pace is None else round(paced(run, pace, step), 3)

    train = svg.thin_out([(clock(line["step"], line["seconds"]), line["loss"]) for line in run.train], CURVE_POINTS)
    steps, wall = info["totals"]["steps"], info["totals"]["train_seconds"]
    return {
        "arm": run.arm.removesuffix(suffix),
        "seed": seed,
        "method": info.get("method"),
        "data": {k: v for k, v in (info.get("data") or {}).items() if k != "files"},
        "totals": info["totals"] | {"train_seconds": clock(steps, wall), "wall_seconds": wall},
        "eval": info["eval"],
        "time": info.get("time"),
        "curve": [
            {k: p[k] for k in ("step", "tokens", "loss")} | {"seconds": clock(p["step"], p["seconds"])}
            for p in run.evals
        ],
        "train_curve": [[round(seconds, 2), round(loss, 4)] for seconds, loss in train],
    }


def summarise(records: Sequence[Record]) -> list[Record]:
    """One row per arm, figures as {"mean", "low", "high", "values"} over its seeds, None where a figure has no base.

    Gaps in nats per token, positive: worse than dense. `gap_equal_seconds_against` names what each was read from.
    """
    dense = {r["seed"]: r for r in records if r["arm"] == "dense"}
    rows: list[Record] = []
    for arm in dict.fromkeys(r["arm"] for r in records):
        own = [r for r in records if r["arm"] == arm]
        pairs = [(r, dense[r["seed"]]) for r in own if r["seed"] in dense and arm != "dense"]
        same_tokens = [(r, d) for r, d in pairs if r["totals"]["tokens"] == d["totals"]["tokens"]]
        rivals = [(r, equal_seconds(r, records)) for r in own if r["method"] is not None]
        rows.append(
            {
                "arm": arm,
                "seeds": [r["seed"] for r in own],
                "method": own[0]["method"],
                "tokens": _over(r["totals"]["tokens"] for r in own),
                "train_seconds": _over(r["totals"]["train_seconds"] for r in own),
                "eval_loss_before": _over(_loss(r, "before") for r in own),
                "eval_loss": _over(_loss(r, "after") for r in own),
                "tokens_per_second": _over(_rate(r) for r in own),
                "ratio": _over(_rate(r) / _rate(d) for r, d in pairs),
                "wall_ratio": _over(_rate(r, "wall_seconds") / _rate(d, "wall_seconds") for r, d in pairs),
                "less_time_percent": _over(100 * (1 - _rate(d) / _rate(r)) for r, d in pairs),
                "gap_equal_tokens": _over(_loss(r, "after") - _loss(d, "after") for r, d in same_tokens),
                "gap_equal_seconds": _over(_loss(r, "after") - rival[0] for r, rival in rivals if rival),
                "gap_equal_seconds_against": sorted({rival[1] for _, rival in rivals if rival}),
                "peak_memory_mb": _over(r["totals"]["peak_memory_mb"] for r in own),
            }
        )
    return rows


def equal_seconds(record: Record, records: Sequence[Record]) -> tuple[float, str] | None:
    """(the loss dense reaches in this run's seconds, how that is known), None where no dense run tells.

    The lower of two readings of the same seed: the line between the ends of a shorter and a longer complete dense run,
    and the full dense run's curve at that second (its learning rate not yet down, so it seldom is the lower one).
    """
    seconds = record["totals"]["train_seconds"]
    dense = [r for r in records if r["seed"] == record["seed"] and r["method"] is None]
    readings: list[tuple[float, str]] = []
    for peer in dense:
        points = sorted((p["seconds"], p["loss"]) for p in peer["curve"])
        at = interpolate(points, seconds, widest=WIDEST_READING) if peer["arm"] == "dense" else None
        if at is not None:
            readings.append((at, "dense curve"))
    ends = sorted((p["totals"]["train_seconds"], _loss(p, "after")) for p in dense)
    between = interpolate(ends, seconds)
    if between is not None:
        readings.append((between, "complete dense runs"))
    return min(readings, default=None)


def _rate(record: Record, clock: str = "train_seconds") -> float:
    """Tokens per training second of the whole run, ladder included."""
    return record["totals"]["tokens"] / record["totals"][clock]


def _loss(record: Record, when: str) -> float:
    return record["eval"][when]["loss"]


def _over(values: Iterable[float]) -> Record | None:
    """A figure over seeds."""
    known = list(values)
    if not known:
        return None
    return {"mean": sum(known) / len(known), "low": min(known), "high": max(known), "values": known}
