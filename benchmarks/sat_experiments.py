"""SAT's real experiments: every arm of a recipe, several seeds, collated into one JSON file.

    python benchmarks/sat_experiments.py cpt --seeds 0 1                  # continual pre-training
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sat_collate import collate

from fallow.errors import ConfigError, DataError, FallowError
from fallow.training.recipe import Recipe
from fallow.training.settings import load_file

ROOT = Path(__file__).resolve().parent.parent
RECIPES, RESULTS = ROOT / "benchmarks" / "recipes", ROOT / "benchmarks" / "results"
EXPERIMENTS = {"cpt": "sat-cpt", "sft": "sat-sft"}
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
    parser.add_argument("--arms", nargs="+", help="these arms beside dense (default: all)")
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

    `data` replaces the folder of the data files; relative paths start at the repository's root.

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
        settings = (of_method if "method" in arms[name] else {}) | arms[name] | {"seed": seed}
        files.append(shared | {"arms": {f"{name}-s{seed}": settings}})
    return files


def _drop_weights(run: Path) -> None:
    """Delete the weights of a finished run: nothing of the results is read from them, and they fill the disk."""
    state = json.loads((run / "run.json").read_text()).get("status") if (run / "run.json").exists() else None
    if state == "finished":
        shutil.rmtree(run / "model", ignore_errors=True)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)


def write(result: Record) -> Path:
    """Write benchmarks/results/EXPERIMENT.json, and return where."""
    from fallow.training.cache import write_atomically

    path = RESULTS / f"{result['experiment']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    return path


if __name__ == "__main__":
    raise SystemExit(main())
