"""Upcycle's real experiments: SmolLM2-135M trained on, dense and sparse, on equal tokens in equal order.

    python benchmarks/upcycle_experiments.py main ablations        # two of these side by side share the work
    python benchmarks/upcycle_experiments.py long --set batch_size=32 steps=500      # other settings of the recipe
    python benchmarks/upcycle_experiments.py collate               # benchmarks/results/upcycle-cpt.json

Every arm is a run as `fallow train` makes it (runs/experiments/upcycle-cpt/ARM): it resumes, and its model can be
generated from, evaluated and exported. When it is finished its loss is taken dense and sparse on three held-out texts.
Ablations take fewer steps (`--short`), and are compared with the main arms' curves at the same step only where these
have the same schedule; so the dense, quantized and linear arms are run short as well. The long arms see ten times the
tokens, in larger steps, and want a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from upcycle_arms import ARMS, LONG, LONG_RECIPE, SETS

from fallow import machine
from fallow.errors import FallowError
from fallow.evaluation import subject
from fallow.training import data, heldout
from fallow.training.progress import Display
from fallow.training.recipe import Recipe
from fallow.training.run import release, run
from fallow.training.runfolder import RunFolder, folder_of
from fallow.training.settings import load_file, parse_flags, resolve

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "benchmarks" / "recipes" / "upcycle-cpt.yaml"
RESULT = ROOT / "benchmarks" / "results" / "upcycle-cpt.json"
SHARED = Path("../shared/data")
HELDOUT = {
    "wikitext-2": SHARED / "wikitext2-test.txt",
    "postgresql": SHARED / "postgresql-manual-eval.txt",
    "technical-english": SHARED / "technical-english-eval.txt",
}
EVAL_TOKENS = 32_768


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed or interrupted, 2 asked wrongly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=[*SETS, "collate"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these arms")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, help="instead of the recipe's, where one arm has the machine to itself")
    parser.add_argument("--short", type=int, default=100, help="steps of the ablations")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every arm's recipe")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file that collate writes")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    try:
        if options.what == ["collate"]:
            collate(options.result)
            return 0
        arithmetic()
        given = parse_flags([f"--{pair}" for pair in options.set])
        for what in options.what:
            short = what == "ablations"
            for name in ["dense", "quantized", "linear", *SETS[what]] if short else SETS[what]:
                if not options.arms or name in options.arms:
                    own = {"steps": options.short if short else options.steps, "threads": options.threads} | given
                    claimed(recipe_of(name, **own), f"{name}-short" if short else name)
        return 0
    except FallowError as error:
        print(f"upcycle_experiments: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("upcycle_experiments: interrupted; the same command goes on from here", file=sys.stderr)
        return 1


def arithmetic() -> None:
    """GSM8K's questions and answers as plain text, a document each, where the recipe looks for them."""
    target = Path("runs/experiments/gsm8k-train.txt")
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.loads(line) for line in (SHARED / "gsm8k-train.jsonl").read_text().splitlines())
    text = "\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows)
    partial = target.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.replace(target)


def recipe_of(name: str, **own: Any) -> Recipe:
    """The recipe of one arm; what is None in `own` stays as the file has it."""
    settings = ARMS[name]
    changes = {"method": "none"} if settings is None else {"method": "upcycle", **settings}
    changes |= LONG_RECIPE if name in LONG else {}
    return resolve(load_file(RECIPE), changes | {k: v for k, v in own.items() if v is not None})


def claimed(recipe: Recipe, arm: str) -> None:
    """Run and judge one arm, unless that is done or another process is at it (delete its .lock file after a crash)."""
    folder = folder_of(recipe, arm).path
    folder.mkdir(parents=True, exist_ok=True)
    judged, lock = folder / "judged.json", folder / "experiment.lock"
    if judged.exists():
        return
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        return
    try:
        run(recipe, arm=arm, command="benchmarks/upcycle_experiments.py", display=Display())
        release()
        judged.write_text(json.dumps({"losses": judge(folder, recipe), "machine": machine.describe()}))
    finally:
        lock.unlink()


def judge(folder: Path, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Held-out losses of a finished run, nats per token, by text and mode."""
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    trained = subject.load(str(folder), verb="upcycle_experiments")
    model, handle = trained.model, trained.sparsity
    found: dict[str, dict[str, float]] = {}
    for name, file in HELDOUT.items():
        only = dataclasses.replace(recipe, train_data=[str(file)], eval_data=[str(file)])  # nothing is trained here
        text = data.prepare(only, trained.tokenizer, model.config.vocab_size)
        found[name] = {}
        for mode in trained.modes:
            taken = heldout.loss(model, text.evaluation, tokens=EVAL_TOKENS, batch_size=4, sparsity=handle, mode=mode)
            assert taken is not None, "nothing stops it"
            found[name][mode] = taken
        print(f"{folder.name} {name}: {found[name]}", flush=True)
    return found


def collate(result_file: Path) -> None:
    """All judged arms in one file, and the curves of those that are not finished. Arms whose folders are not here keep
    what the file has of them."""
    recipe = recipe_of("dense")
    before = json.loads(result_file.read_text()) if result_file.exists() else {}
    runs: dict[str, dict[str, Any]] = {r["arm"]: r for r in before.get("runs", [])}
    unfinished: dict[str, list[dict[str, Any]]] = before.get("unfinished", {})
    for metrics in sorted(folder_of(recipe, "dense").path.parent.glob("*/metrics.jsonl")):
        curve = [
            {k: line[k] for k in ("step", "loss", "sparse_loss") if k in line}
            for line in map(json.loads, metrics.read_text().splitlines())
            if line["kind"] == "eval"
        ]
        judged = metrics.with_name("judged.json")
        if not judged.exists():
            unfinished[metrics.parent.name] = curve
            continue
        record: dict[str, Any] = RunFolder(metrics.parent).read() or {}
        kept = {k: record[k] for k in ("arm", "method", "precision", "totals", "eval", "versions")}
        schedule = ("steps", "batch_size", "accumulate", "seq_len", "lr")
        kept["schedule"] = {k: record["recipe"][k] for k in schedule}
        looks = record.get("insight", {}).get("looks", [])
        runs[metrics.parent.name] = kept | json.loads(judged.read_text()) | {"curve": curve, "looks": looks}
        unfinished.pop(metrics.parent.name, None)
    result = {"experiment": "upcycle-cpt", "command": "python benchmarks/upcycle_experiments.py main ablations"}
    in_order = [runs[arm] for arm in sorted(runs)]
    result |= {"recipe": dataclasses.asdict(recipe), "runs": in_order, "unfinished": unfinished}
    result_file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {result_file}: {len(runs)} runs, {len(unfinished)} unfinished")


if __name__ == "__main__":
    sys.exit(main())
