"""SMET's real experiments: a small Llama from scratch, dense and sparse in many forms, several seeds, one JSON per run.

    python benchmarks/smet_experiments.py main ablations --seeds 0 1     # two of these side by side share the work
    python benchmarks/smet_experiments.py collate                        # benchmarks/results/smet-pretrain.json

Runs are named ARM-sSEED; a finished one is skipped, and one that another process has begun is left to it (delete its
.lock file after a crash). All arms of a seed see the same rows in the same order from the same first weights. A run is
single-threaded by default: on small models two at a time get more done than one with two threads, and its seconds are
those of its own thread. Around each topology update the loss on one fixed held-out batch is taken at every step, apart
from the clock; around the same steps in forms whose topology rests, which show how the loss moves without an update.
Cost: about 2 minutes a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scratch_runs import batches, claimed, gathered, lr_factor, optimizer_of, probed, state_bytes
from smet_arms import ARMS, EVERY, SETS, Arm

import fallow
from fallow import machine
from fallow.errors import FallowError
from fallow.ops.cross_entropy import causal_lm_loss
from fallow.training import data, heldout, scratch
from fallow.training.recipe import Recipe
from fallow.training.settings import load_file, resolve
from fallow.training.trainer import collate

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "benchmarks" / "recipes" / "smet-pretrain.yaml"
RESULT = ROOT / "benchmarks" / "results" / "smet-pretrain.json"
AFTER = 10
"""Steps after a topology update that the loss is followed for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed or interrupted, 2 asked wrongly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=[*SETS, "collate"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these arms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--output", default=os.path.relpath(ROOT / "runs" / "experiments" / "smet-pretrain"))
    options = parser.parse_args(argv)
    folder = Path(options.output)
    try:
        if options.what == ["collate"]:
            print(f"wrote {write(folder)}")
            return 0
        torch.set_num_threads(options.threads)
        os.chdir(ROOT)  # the recipe's data is named from here
        flags = {"steps": options.steps} if options.steps else {}
        recipe = resolve(load_file(RECIPE), flags)
        folder.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for arm in (a for what in options.what for a in SETS.get(what, ())):
                if not options.arms or arm.name in options.arms:
                    claimed(folder, f"{arm.name}-s{seed}", partial(train, recipe, arm, seed))
        return 0
    except FallowError as error:
        print(f"smet_experiments: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("smet_experiments: interrupted; the same command goes on from here", file=sys.stderr)
        return 1


def train(recipe: Recipe, arm: Arm, seed: int) -> dict[str, Any]:
    """One run; returns its record."""
    recipe = dataclasses.replace(
        recipe,
        seed=seed,
        architecture=recipe.architecture | arm.widths,
        steps=round(recipe.steps * arm.steps_scale),
    )
    begin = scratch.start(recipe, torch.float32)
    model = begin.model
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    text = data.prepare(recipe, begin.tokenizer, model.config.vocab_size)
    handle = fallow.sparsify(model, fallow.SMET(seed=seed, **arm.smet)) if arm.smet is not None else None
    optimizer = optimizer_of(model, handle, recipe, lr_scale=arm.lr_scale)
    warm = max(1, round(recipe.warmup * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, warm, recipe.steps))
    probe = collate([text.evaluation[i] for i in range(-recipe.batch_size, 0)])
    losses: list[float] = []
    windows: list[list[float]] = []
    seconds, since = 0.0, AFTER + 1
    for step, batch in enumerate(batches(text.train, recipe)):
        began = time.thread_time()
        if handle is not None:
            handle.before_step(step, recipe.steps)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += time.thread_time() - began
        losses.append(float(loss.detach()))
        if since <= AFTER:
            windows[-1].append(probed(model, probe))
            since += 1
        followed = update_due(step, recipe.steps, (arm.smet or {}).get("update_every") or EVERY)
        if followed:
            windows.append([probed(model, probe)])
            since = 1
        began = time.thread_time()
        if handle is not None:
            handle.after_step(step, recipe.steps)
        seconds += time.thread_time() - began
        if followed:
            windows[-1].append(probed(model, probe))
    memory = handle.memory() if handle is not None else None
    found = heldout.loss(
        model,
        text.evaluation,
        tokens=recipe.eval_tokens,
        batch_size=recipe.batch_size,
        sparsity=handle,
        stopped=lambda: False,
    )
    return {
        "arm": arm.name,
        "seed": seed,
        "method": arm.smet,
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.tokens_per_step(),
        "lr": recipe.lr * arm.lr_scale,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": state_bytes(model, optimizer),
        "memory": memory,
        "heldout": found,
        "seconds": round(seconds, 2),
        "losses": [round(x, 4) for x in losses],
        "windows": [[round(x, 5) for x in w] for w in windows],
        "metrics": handle.metrics() if handle is not None else {},
        "threads": torch.get_num_threads(),
        "machine": machine.describe(),
    }


def update_due(step: int, steps: int, every: int) -> bool:
    """Whether an update comes after this step."""
    return every > 0 and (step + 1) % every == 0 and step + 1 < steps


def write(folder: Path) -> Path:
    """All runs in one file, machine once."""
    gathered(folder, "smet-pretrain", dataclasses.asdict(resolve(load_file(RECIPE), {})), RESULT)
    return RESULT.relative_to(ROOT)


if __name__ == "__main__":
    sys.exit(main())
