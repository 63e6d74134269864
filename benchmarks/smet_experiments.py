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
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from smet_arms import ARMS, EMBEDDING_LR, EVERY, MATRIX_LR, SETS, Arm
from torch import Tensor

import fallow
from fallow import machine
from fallow.errors import FallowError
from fallow.ops.cross_entropy import causal_lm_loss
from fallow.optim import adamw_for
from fallow.training import data, heldout, scratch
from fallow.training.recipe import Recipe
from fallow.training.settings import load_file, resolve
from fallow.training.trainer import RowOrder, collate

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
                    claimed(folder, recipe, arm, seed)
        return 0
    except FallowError as error:
        print(f"smet_experiments: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("smet_experiments: interrupted; the same command goes on from here", file=sys.stderr)
        return 1


def claimed(folder: Path, recipe: Recipe, arm: Arm, seed: int) -> None:
    """Run one arm, unless it is done or another process has it."""
    name = f"{arm.name}-s{seed}"
    target, lock = folder / f"{name}.json", folder / f"{name}.lock"
    if target.exists():
        return
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        return
    try:
        record = train(recipe, arm, seed)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.replace(target)
        print(f"{name}: held-out {record['heldout']:.4f}, {record['seconds']:.0f} s", flush=True)
    finally:
        lock.unlink()


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
    optimizer = optimizer_of(model, handle, recipe, arm)
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


def optimizer_of(model: Any, handle: Any, recipe: Recipe, arm: Arm) -> torch.optim.Optimizer:
    """The arm's optimizer; matrices of the blocks, dense or packed, and embeddings at rates of their own."""
    settings = {"lr": recipe.lr * arm.lr_scale, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    optimizer = adamw_for(model, **settings) if handle is None else handle.optimizer(**settings)
    embedding = model.get_input_embeddings().weight
    for group in list(optimizer.param_groups):
        matrices = group.get("packed") or group["params"][0].ndim > 1
        if any(p is embedding for p in group["params"]):
            shared = {k: v for k, v in group.items() if k != "params"}
            group["params"] = [p for p in group["params"] if p is not embedding]
            optimizer.add_param_group(shared | {"params": [embedding], "lr": group["lr"] * EMBEDDING_LR})
        if matrices:
            group["lr"] *= MATRIX_LR
    optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]
    return optimizer


def lr_factor(step: int, warm: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth (the paper's)."""
    if step < warm:
        return (step + 1) / warm
    progress = torch.tensor((step - warm) / max(1, steps - warm) * torch.pi)
    return 0.1 + 0.45 * (1 + float(progress.cos()))


def update_due(step: int, steps: int, every: int) -> bool:
    """Whether an update comes after this step."""
    return every > 0 and (step + 1) % every == 0 and step + 1 < steps


def batches(rows: Any, recipe: Recipe) -> Iterator[dict[str, Tensor]]:
    """The batches of a run: a pure function of the recipe's seed."""
    order = list(RowOrder(rows=len(rows), count=recipe.steps * recipe.batch_size, seed=recipe.seed))
    for first in range(0, len(order), recipe.batch_size):
        yield collate([rows[i] for i in order[first : first + recipe.batch_size]])


@torch.no_grad()
def probed(model: torch.nn.Module, batch: dict[str, Tensor]) -> float:
    """Loss on the fixed held-out batch."""
    return float(model(**batch, use_cache=False).loss)


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, gradients (as many bytes), buffers and optimizer state."""
    weights = sum(2 * p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    return weights + sum(
        s.nbytes for state in optimizer.state.values() for s in state.values() if isinstance(s, Tensor)
    )


def write(folder: Path) -> Path:
    """All runs in one file, machine once."""
    runs = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    hosts = {json.dumps(r.pop("machine"), sort_keys=True) for r in runs}
    recipe = dataclasses.asdict(resolve(load_file(RECIPE), {}))
    result = {
        "experiment": "smet-pretrain",
        "recipe": recipe,
        "machines": [json.loads(h) for h in sorted(hosts)],
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    return RESULT.relative_to(ROOT)


if __name__ == "__main__":
    sys.exit(main())
