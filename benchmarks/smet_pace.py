"""What a training step of every arm of SMET's experiments costs, all arms interleaved in one process.

    python benchmarks/smet_pace.py            # benchmarks/results/smet-pace.json

Runs of one arm after another compare the machine's drift as much as the arms. Here every arm takes one step in turn,
in alternating order, for two whole intervals between topology updates, so that each pays for its updates as often as
it does in a run. Figures are an arm's total over dense's, with the quartiles of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence

import scratch_runs
import smet_experiments as experiments
import torch
from smet_arms import EVERY, MAIN, Arm

import fallow
from fallow import machine
from fallow.bench.harness import interleave
from fallow.ops.cross_entropy import causal_lm_loss
from fallow.training import data, scratch
from fallow.training.recipe import Recipe
from fallow.training.settings import load_file, resolve

RESULT = experiments.ROOT / "benchmarks" / "results" / "smet-pace.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="as in the runs")
    parser.add_argument("--intervals", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    os.chdir(experiments.ROOT)
    recipe = resolve(load_file(experiments.RECIPE), {})
    forms = {arm.name: stepper(recipe, arm) for arm in MAIN}
    timing = interleave(forms, rounds=EVERY * options.intervals, warm_up=2)
    total = {name: sum(seconds) for name, seconds in timing.seconds.items()}
    rows = [
        {
            "arm": name,
            "step_ms": 1e3 * total[name] / len(timing.seconds[name]),
            "step_time": total[name] / total["dense"],
            "quartiles": timing.spread(name, "dense"),
        }
        for name in forms
    ]
    result = {"experiment": "smet-pace", "command": "python benchmarks/smet_pace.py", "machine": machine.describe()}
    result |= {"threads": options.threads, "rounds": EVERY * options.intervals, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['arm']:<12} {row['step_ms']:7.1f} ms  {row['step_time']:.3f} of dense")
    return 0


def stepper(recipe: Recipe, arm: Arm) -> Callable[[], None]:
    """One training step of an arm per call, topology updates included."""
    recipe = dataclasses.replace(recipe, architecture=recipe.architecture | arm.widths)
    begin = scratch.start(recipe, torch.float32)
    model = begin.model
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    rows = data.prepare(recipe, begin.tokenizer, model.config.vocab_size).train
    handle = fallow.sparsify(model, fallow.SMET(**arm.smet)) if arm.smet is not None else None
    optimizer = scratch_runs.optimizer_of(model, handle, recipe, lr_scale=arm.lr_scale)
    stream = scratch_runs.batches(rows, recipe)
    steps = iter(range(recipe.steps))

    def step() -> None:
        at = next(steps)
        if handle is not None:
            handle.before_step(at, recipe.steps)
        model(**next(stream), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        if handle is not None:
            handle.after_step(at, recipe.steps)

    return step


if __name__ == "__main__":
    sys.exit(main())
