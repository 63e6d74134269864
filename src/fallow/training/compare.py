"""Dense and sparse arms on the same data, order and seed, one after the other in this process; then the report.

One process per arm would be simpler to keep apart, but start-up, page cache and clock frequency would differ between
arms; here each arm is freshly loaded after the one before is freed. Quality is compared at equal tokens (the last
held-out loss) and at equal seconds (the dense arm's own curve, read at this arm's seconds), because a cheaper step
that learns less is no gain.
"""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fallow.errors import ConfigError
from fallow.training.cache import write_atomically
from fallow.training.progress import Display
from fallow.training.recipe import Recipe
from fallow.training.run import release, run
from fallow.training.runfolder import RunFolder, folder_of
from fallow.training.settings import closest, resolve

Curve = list[tuple[float, float]]


def resolve_arms(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Recipe]:
    """Every arm's recipe, checked before the first one starts. Raises ConfigError naming the arm."""
    names = list(file.get("arms") or {})
    if not names:
        raise ConfigError("recipe: fallow compare needs arms: a mapping of arm name -> settings, one of them dense")
    arms = {name: resolve(file, flags, arm=name) for name in names}
    for name, recipe in arms.items():
        other = recipe.equal_seconds_to
        if other is not None and (other not in arms or other == name):
            raise ConfigError(f"recipe: arm {name}: equal_seconds_to: no other arm {other!r}{closest(other, names)}")
        if other is not None:
            _reference(name, arms)
    if any(r.nproc != 1 for r in arms.values()):
        raise ConfigError("recipe: fallow compare runs its arms in one process; use nproc: 1, or fallow train per arm")
    folders = {(r.output, r.name) for r in arms.values()}
    if len(folders) > 1:
        raise ConfigError("recipe: arms may not change name or output; they share one folder")
    _order(arms)
    return arms


def compare(
    arms: dict[str, Recipe],
    *,
    command: str,
    display: Display,
    write_report: Callable[[list[Path], Path], Path],
    overwrite: bool = False,
) -> tuple[dict[str, Any], Path | None]:
    """Run what is not finished, compare, and write the report with `write_report(run folders, file)`.

    Returns:
        (compare.json as written, path of report.html); (the rows so far, None) when Ctrl-C stopped it.

    Raises:
        as `run.run`.
    """
    records: dict[str, dict[str, Any]] = {}
    for position, name in enumerate(_order(arms), start=1):
        recipe = arms[name]
        display.say(f"\narm {name} ({position} of {len(arms)})")
        if recipe.equal_seconds_to is not None:
            recipe = _shortened(name, arms, records, overwrite, display)
        records[name] = run(recipe, arm=name, command=command, display=display, overwrite=overwrite)
        release()
        if records[name]["status"] != "finished":
            return {"run": recipe.name, "arms": list(records), "status": records[name]["status"]}, None
    some = next(iter(arms.values()))
    parent = folder_of(some, "arm").path.parent
    curves = {name: _curve(folder_of(arms[name], name)) for name in arms}
    result = table(some.name, {name: records[name] for name in arms}, curves, _baseline(arms))
    write_atomically(parent / "compare.json", (json.dumps(result, indent=1) + "\n").encode())
    return result, write_report([folder_of(r, name).path for name, r in arms.items()], parent / "report.html")


def table(run_name: str, records: dict[str, dict[str, Any]], curves: dict[str, Curve], baseline: str) -> dict[str, Any]:
    """compare.json from run.json records and held-out (seconds, loss) curves.

    An arm that is made to be served sparse is judged by its loss computed sparse (`judged_sparse`).
    `loss_gap_equal_tokens` is None for an arm with other tokens than the baseline's, `loss_gap_equal_seconds` where the
    baseline's curve does not reach this arm's seconds. Positive gaps mean that the arm is worse.
    """
    base = records[baseline]
    rows = []
    for name, record in records.items():
        t = record["totals"]
        both = record["eval"]["after"]
        loss = both["sparse_loss"] if record.get("judged_sparse") else both["loss"]
        there = interpolate(curves[baseline], t["train_seconds"])
        same_tokens = t["tokens"] == base["totals"]["tokens"]
        base_rate = base["totals"]["tokens_per_second"]
        rows.append(
            {
                "arm": name,
                "eval_loss": loss,
                "eval_loss_dense": both["loss"],
                "tokens": t["tokens"],
                "train_seconds": t["train_seconds"],
                "tokens_per_second": t["tokens_per_second"],
                "speedup_tokens_per_second": t["tokens_per_second"] / base_rate if base_rate else None,
                "loss_gap_equal_tokens": loss - base["eval"]["after"]["loss"] if same_tokens else None,
                "loss_gap_equal_seconds": loss - there if there is not None else None,
            }
        )
    return {"run": run_name, "arms": list(records), "baseline": baseline, "rows": rows}


def interpolate(curve: Curve, seconds: float) -> float | None:
    """The loss at `seconds`, linear between measured points; None outside of them."""
    if not curve or not curve[0][0] <= seconds <= curve[-1][0]:
        return None
    i = bisect_left([s for s, _ in curve], seconds)
    (s1, l1) = curve[i]
    if s1 == seconds or i == 0:
        return l1
    (s0, l0) = curve[i - 1]
    return l0 + (l1 - l0) * (seconds - s0) / (s1 - s0)


def _curve(folder: RunFolder) -> Curve:
    lines = [json.loads(text) for text in folder.metrics_file.read_text().splitlines()]
    return sorted((line["seconds"], line["loss"]) for line in lines if line["kind"] == "eval")


def _baseline(arms: Mapping[str, Recipe]) -> str:
    """The first dense arm of full length, else the first arm."""
    dense = [n for n, r in arms.items() if r.method == "none" and r.equal_seconds_to is None]
    return dense[0] if dense else next(iter(arms))


def _order(arms: Mapping[str, Recipe]) -> list[str]:
    """Arms in the file's order, each after the one whose seconds it takes."""
    order: list[str] = []

    def place(name: str, waiting: tuple[str, ...]) -> None:
        if name in waiting:
            raise ConfigError(f"recipe: equal_seconds_to goes in a circle: {' -> '.join((*waiting, name))}")
        if name not in order:
            other = arms[name].equal_seconds_to
            for first in (other, _reference(name, arms)) if other is not None else ():
                place(first, (*waiting, name))
            order.append(name)

    for name in arms:
        place(name, ())
    return order


def _reference(name: str, arms: Mapping[str, Recipe]) -> str:
    """The arm with the same settings and full steps, from which the seconds per step of arm `name` are known."""

    def same(recipe: Recipe) -> dict[str, Any]:
        return dataclasses.asdict(recipe) | {"steps": 0, "equal_seconds_to": None, "eval_every": 0}

    for other, recipe in arms.items():
        if other != name and recipe.equal_seconds_to is None and same(recipe) == same(arms[name]):
            return other
    raise ConfigError(
        f"recipe: arm {name}: equal_seconds_to needs another arm with the same settings and no equal_seconds_to,"
        " to know how long its step takes; add one"
    )


def _shortened(
    name: str, arms: Mapping[str, Recipe], records: Mapping[str, Any], overwrite: bool, display: Display
) -> Recipe:
    """Arm `name` with as many steps as fit into the other arm's seconds; those it began with when it resumes."""
    recipe = arms[name]
    earlier = None if overwrite else folder_of(recipe, name).read()
    if earlier is not None and earlier.get("recipe", {}).get("steps"):
        return dataclasses.replace(recipe, steps=int(earlier["recipe"]["steps"]))
    target = records[str(recipe.equal_seconds_to)]["totals"]["train_seconds"]
    totals = records[_reference(name, arms)]["totals"]
    steps = max(1, round(target / (totals["train_seconds"] / totals["steps"])))
    display.say(f"{steps} steps take the {target:.0f} s of arm {recipe.equal_seconds_to}")
    return dataclasses.replace(recipe, steps=steps)
