"""What an update of the topology does to the loss, by itself: branches of one run, with and without the update.

    python benchmarks/smet_spike.py --density 0.25            # adds to benchmarks/results/smet-spike.json

The loss around updates of whole runs is mostly the noise of training. So one run with a resting topology is stopped at
many steps; from each of these states ten steps are taken three times on the same batches: without an update, after an
update as plain SET makes it (newborn weights share the run's Adam clock), and as SMET makes it (own clock, ramp). The
same weights die and are born in both. The rise is the loss on a fixed held-out batch against the branch without an
update, mean over ten steps and all stops. `--lr-exponent 0` gives SET's own learning rate. Cost: about 5 minutes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import scratch_runs
import smet_experiments as experiments
import torch
from smet_arms import EVERY

import fallow
from fallow import machine
from fallow.ops.cross_entropy import causal_lm_loss
from fallow.training import data, scratch
from fallow.training.settings import load_file, resolve
from fallow.training.trainer import collate

RESULT = experiments.ROOT / "benchmarks" / "results" / "smet-spike.json"
BRANCHES: dict[str, dict[str, Any]] = {
    "none": {"update_fraction": 0.0},
    "set": {"local_clock": False, "warmup_steps": 0},
    "reset": {"warmup_steps": 0},
    "smet": {},
}
STEPS = 10


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--lr-exponent", type=float, default=0.5)
    parser.add_argument("--lr-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    os.chdir(experiments.ROOT)
    row = measure(options.density, options.lr_exponent, options.lr_scale, options.seed)
    held = json.loads(RESULT.read_text()) if RESULT.exists() else {"experiment": "smet-spike", "rows": []}
    same = ("density", "lr_exponent", "lr_scale", "seed")
    held["rows"] = [r for r in held["rows"] if any(r[k] != row[k] for k in same)] + [row]
    held["machine"] = machine.describe()
    RESULT.write_text(json.dumps(held, indent=1) + "\n")
    print({k: v for k, v in row.items() if k != "curves"})
    return 0


def measure(density: float, lr_exponent: float, lr_scale: float, seed: int) -> dict[str, Any]:
    """One run with its branches."""
    recipe = dataclasses.replace(resolve(load_file(experiments.RECIPE), {}), seed=seed)
    begin = scratch.start(recipe, torch.float32)
    model = begin.model
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    text = data.prepare(recipe, begin.tokenizer, model.config.vocab_size)
    config = fallow.SMET(density=density, lr_exponent=lr_exponent, update_every=1, seed=seed)
    handle: Any = fallow.sparsify(model, dataclasses.replace(config, update_fraction=0.0))
    optimizer = scratch_runs.optimizer_of(model, handle, recipe, lr_scale=lr_scale)
    warm = max(1, round(recipe.warmup * recipe.steps))
    base = [g["lr"] for g in optimizer.param_groups]
    probe = collate([text.evaluation[i] for i in range(-2 * recipe.batch_size, 0)])
    rows = list(scratch_runs.batches(text.train, recipe))

    def step(at: int) -> None:
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * scratch_runs.lr_factor(at, warm, recipe.steps)
        model(**rows[at], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()

    def use(settings: dict[str, Any]) -> None:
        handle.config = optimizer.config = dataclasses.replace(config, **settings)

    rises: dict[str, list[list[float]]] = {name: [] for name in BRANCHES}
    for at in range(recipe.steps):
        step(at)
        if (at + 1) % EVERY or at + 1 < 2 * EVERY or at + 1 + STEPS >= recipe.steps:
            continue
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
        for name, settings in BRANCHES.items():
            use(settings)
            handle.before_step(at, recipe.steps)
            handle.after_step(at, recipe.steps)
            losses = [scratch_runs.probed(model, probe)]
            for later in range(at + 1, at + 1 + STEPS):
                step(later)
                losses.append(scratch_runs.probed(model, probe))
            rises[name].append(losses)
            model.load_state_dict(saved[0])
            handle.load_state_dict(saved[2])
            optimizer.load_state_dict(copy.deepcopy(saved[1]))
        use({"update_fraction": 0.0})
    curves = {n: [statistics.fmean(c) for c in zip(*_against(rises[n], rises["none"]), strict=True)] for n in BRANCHES}
    found = {n: statistics.fmean(c[1:]) for n, c in curves.items() if n != "none"}
    return {
        "density": density,
        "lr_exponent": lr_exponent,
        "lr_scale": lr_scale,
        "seed": seed,
        "stops": len(rises["none"]),
        "rise": found,
        "at_once": {n: c[0] for n, c in curves.items() if n != "none"},
        "after_first_step": {n: statistics.fmean(c[1:]) - c[0] for n, c in curves.items() if n != "none"},
        "smet_of_set": found["smet"] / found["set"],
        "curves": curves,
    }


def _against(branch: list[list[float]], none: list[list[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(branch, none, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
