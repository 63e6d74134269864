"""SAT's real experiments: every arm of a recipe, several seeds, collated into one JSON file.

    python benchmarks/sat_experiments.py cpt --seeds 0 1 --steps 150      # continual pre-training
    python benchmarks/sat_experiments.py sft --seeds 0 1 --arms dense sat-50
    python benchmarks/sat_experiments.py collate                          # the JSON files again, without running

Each arm runs as `fallow compare` would run it, into runs/experiments/sat-cpt/ARM-sSEED; finished runs are skipped, an
unfinished one resumes. Every second seed takes the arms in reverse order, so that a machine that drifts favours no arm.
A figure of an arm is paired with the dense run of the *same seed* before it is averaged: seeds differ in their data
order by more than the forms differ. Cost: the training itself; weights are deleted after each arm (--keep-weights).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fallow.errors import ConfigError, DataError, FallowError
from fallow.report import svg
from fallow.report.analysis import WIDEST_READING, interpolate
from fallow.report.loading import Run, load
from fallow.training.recipe import Recipe
from fallow.training.settings import load_file

ROOT = Path(__file__).resolve().parent.parent
RECIPES, RESULTS = ROOT / "benchmarks" / "recipes", ROOT / "benchmarks" / "results"
EXPERIMENTS = {"cpt": "sat-cpt", "sft": "sat-sft"}
CURVE_POINTS = 60
"""Points kept of each curve of training losses."""
SAME_SECONDS = 0.03
"""Two runs whose training seconds differ by less than this share count as equally long (ours)."""

_PER_ARM = (
    "name",
    "output",
    "seed",
    "method",
    "method_settings",
    "arms",
    "equal_seconds_to",
    "train_data",
    "eval_data",
)

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed or interrupted, 2 asked wrongly."""
    options = _parser().parse_args(argv)
    try:
        if options.what != "collate":
            return run_seeds(options)
        found = [name for name in EXPERIMENTS.values() if (Path(options.output) / name).is_dir()]
        if not found:
            raise DataError(f"{options.output} holds no experiment yet; run this with cpt or sft first")
        for name in found:
            print(f"wrote {write(collate(name, Path(options.output) / name))}")
        return 0
    except FallowError as error:
        print(f"sat_experiments: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DataError) else 1
    except KeyboardInterrupt:
        print("sat_experiments: interrupted; the same command goes on from here", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=[*EXPERIMENTS, "collate"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, help="optimizer steps of a full arm (default: the recipe's)")
    parser.add_argument("--arms", nargs="+", help="these arms, and what they are measured against (default: all)")
    parser.add_argument(
        "--data",
        default=os.environ.get("FALLOW_DATA"),
        help="folder of the data files (default: FALLOW_DATA, else the recipe's, relative to the repository's root)",
    )
    parser.add_argument("--output", default=os.path.relpath(ROOT / "runs" / "experiments"), help="folder of the runs")
    parser.add_argument("--keep-weights", action="store_true", help="keep each run's model and checkpoints")
    return parser


def run_seeds(options: argparse.Namespace) -> int:
    """Run every asked arm of every seed, collating after each. Returns 0, or 1 when Ctrl-C interrupted."""
    from fallow.report import write_report
    from fallow.training.compare import compare, resolve_arms
    from fallow.training.progress import Display
    from fallow.training.quiet import quiet
    from fallow.training.run import folder_of

    quiet()
    name = EXPERIMENTS[options.what]
    recipe = load_file(RECIPES / f"{name}.yaml")
    flags: Record = {"output": options.output}
    if options.steps is not None:
        flags |= {"steps": options.steps, "eval_every": max(1, options.steps // 3)}
    command = " ".join(["python", "benchmarks/sat_experiments.py", *map(str, sys.argv[1:])])
    display = Display()
    planned = [
        resolve_arms(file, flags)
        for turn, seed in enumerate(options.seeds)
        for file in one_at_a_time(recipe, seed, options.arms, options.data, backwards=turn % 2 == 1)
    ]
    for arms in planned:
        result, report = compare(arms, command=command, display=display, write_report=write_report)
        (Path(options.output) / name / "compare.json").unlink(missing_ok=True)  # of these arms only
        if not options.keep_weights:
            for arm, settings in arms.items():
                _drop_weights(folder_of(settings, arm).path)
        if report is None:
            display.say(f"stopped ({result.get('status')}); the same command goes on from here")
            return 1
        write(collate(name, Path(options.output) / name))
    folder = Path(options.output) / name
    display.say(f"wrote {write(collate(name, folder))} and {write_report([folder], folder / 'report.html')}")
    return 0


def one_at_a_time(
    recipe: Record, seed: int, wanted: Sequence[str] | None, data: str | None, *, backwards: bool
) -> list[Record]:
    """One recipe per arm, so that its weights can be deleted before the next arm starts.

    An arm that takes another's seconds brings that one and the dense arm along, which are then found finished. `data`
    replaces the folder of the data files; relative paths start at the repository's root.

    Raises:
        ConfigError: an arm that the recipe does not have.
    """
    arms: dict[str, Record] = {name: dict(own or {}) for name, own in recipe["arms"].items()}
    unknown = sorted(set(wanted or ()) - set(arms))
    if unknown:
        raise ConfigError(f"no arm {', '.join(unknown)} in {recipe['name']}.yaml; use {', '.join(arms)}")
    chosen = ["dense", *(name for name in arms if name in (wanted or arms) and name != "dense")]
    of_recipe = {field.name for field in dataclasses.fields(Recipe)} - {"arms"}
    of_method = {key: value for key, value in recipe.items() if key not in of_recipe and key != "arms"}
    shared = {key: value for key, value in recipe.items() if key in of_recipe}
    folder = data and Path(os.path.relpath(ROOT / data))
    for key in ("train_data", "eval_data"):
        shared[key] = [str(folder / Path(e).name) if folder else os.path.relpath(ROOT / e) for e in recipe[key]]
    files = []
    for name in reversed(chosen) if backwards else chosen:
        other = arms[name].get("equal_seconds_to")
        together = [name] if other is None else ["dense", other, name]
        renamed = {
            f"{arm}-s{seed}": (of_method if "method" in arms[arm] else {}) | arms[arm] | {"seed": seed}
            for arm in together
        }
        if other is not None:
            renamed[f"{name}-s{seed}"]["equal_seconds_to"] = f"{other}-s{seed}"
        files.append(shared | {"arms": renamed})
    return files


def _drop_weights(run: Path) -> None:
    """Delete the weights of a finished run: nothing of the results is read from them, and they fill the disk."""
    state = json.loads((run / "run.json").read_text()).get("status") if (run / "run.json").exists() else None
    if state == "finished":
        shutil.rmtree(run / "model", ignore_errors=True)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)


def collate(name: str, folder: Path) -> Record:
    """The JSON of one experiment from its run folders; unfinished runs are left out.

    Raises:
        DataError: no run of `folder` is finished.
    """
    runs = [run for run in load([folder]).runs if run.status == "finished"]
    if not runs:
        raise DataError(f"{folder}: no run is finished yet; nothing to collate")
    records = [_record(run) for run in runs]
    order = list(load_file(RECIPES / f"{name}.yaml")["arms"])
    whole = min(runs, key=lambda run: bool(run.info["recipe"].get("equal_seconds_to"))).info
    records.sort(key=lambda r: (order.index(r["arm"]) if r["arm"] in order else len(order), r["arm"], r["seed"]))
    return {
        "experiment": name,
        "recipe": {k: v for k, v in whole["recipe"].items() if k not in _PER_ARM},
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


def _record(run: Run) -> Record:
    info = run.info
    seed = int(info["recipe"]["seed"])
    other = info["recipe"].get("equal_seconds_to")
    suffix = f"-s{seed}"
    train = svg.thin_out([(line["seconds"], line["loss"]) for line in run.train], CURVE_POINTS)
    return {
        "arm": run.arm.removesuffix(suffix),
        "seed": seed,
        "method": info.get("method"),
        "equal_seconds_to": other and str(other).removesuffix(suffix),
        "data": {k: v for k, v in (info.get("data") or {}).items() if k != "files"},
        "totals": info["totals"],
        "eval": info["eval"],
        "time": info.get("time"),
        "curve": [{key: point[key] for key in ("step", "tokens", "seconds", "loss")} for point in run.evals],
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
        rivals = [(r, equal_seconds(r, records)) for r in own if arm != "dense"]
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

    First choice is a complete dense run of that length, planned or by chance. Failing that, the lower of two readings
    of the same seed: the full dense run's curve at that second (its learning rate not yet down, so the curve flatters
    the arm), and the line between the ends of a shorter and a longer complete dense run.
    """
    seconds = record["totals"]["train_seconds"]
    peers = [r for r in records if r["seed"] == record["seed"] and r["method"] is None and r is not record]

    def away(peer: Record) -> float:
        return peer["totals"]["train_seconds"] / seconds - 1

    for peer in sorted(peers, key=lambda p: (p["equal_seconds_to"] != record["arm"], abs(away(p)))):
        if abs(away(peer)) <= SAME_SECONDS:
            return _loss(peer, "after"), peer["arm"]
        if peer["equal_seconds_to"] == record["arm"]:
            return _loss(peer, "after"), f"{peer['arm']} ({away(peer):+.0%} seconds)"
    readings: list[tuple[float, str]] = []
    for peer in peers:
        points = sorted((p["seconds"], p["loss"]) for p in peer["curve"])
        at = interpolate(points, seconds, widest=WIDEST_READING) if peer["arm"] == "dense" else None
        if at is not None:
            readings.append((at, "dense curve"))
    ends = sorted((p["totals"]["train_seconds"], _loss(p, "after")) for p in peers) if record["method"] else []
    between = interpolate(ends, seconds)
    if between is not None:
        readings.append((between, "line between complete dense runs"))
    return min(readings, default=None)


def _rate(record: Record) -> float:
    """Tokens per training second of the whole run, ladder included."""
    return record["totals"]["tokens"] / record["totals"]["train_seconds"]


def _loss(record: Record, when: str) -> float:
    return record["eval"][when]["loss"]


def _over(values: Iterable[float]) -> Record | None:
    """A figure over seeds."""
    known = list(values)
    if not known:
        return None
    return {"mean": sum(known) / len(known), "low": min(known), "high": max(known), "values": known}


def write(result: Record) -> Path:
    """Write benchmarks/results/EXPERIMENT.json, and return where."""
    from fallow.training.cache import write_atomically

    path = RESULTS / f"{result['experiment']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    return path


if __name__ == "__main__":
    raise SystemExit(main())
