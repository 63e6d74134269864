"""What experiments that train small models from scratch share: batches, learning rates, and who runs which arm.

A run is a pure function of its recipe, arm and seed, and single-threaded by default: on small models two at a time get
more done than one with two threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fallow.optim import adamw_for
from fallow.training.recipe import Recipe
from fallow.training.trainer import RowOrder, collate

MATRIX_LR, EMBEDDING_LR = 0.25, 8.0
"""Matrices of the blocks, and embeddings (tied to the head), learn at these times the recipe's rate, in every arm. With
one rate for all, none serves dense: what its embeddings need is too much for its blocks, and sparse layers, whose
outputs move by less per step, would win by that alone (docs/negative-results.md)."""


def claimed(folder: Path, name: str, train: Callable[[], dict[str, Any]]) -> None:
    """Run one arm of one seed, unless it is done or another process has it (delete its .lock file after a crash)."""
    target, lock = folder / f"{name}.json", folder / f"{name}.lock"
    if target.exists():
        return
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        return
    try:
        record = train()
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.replace(target)
        print(f"{name}: held-out {record['heldout']:.4f}, {record['seconds']:.0f} s", flush=True)
    finally:
        lock.unlink()


def optimizer_of(
    model: Any, handle: Any, recipe: Recipe, *, lr_scale: float = 1.0, matrix_scale: float = 1.0
) -> torch.optim.Optimizer:
    """The arm's optimizer; matrices of the blocks, dense or packed, and embeddings at rates of their own."""
    settings = {"lr": recipe.lr * lr_scale, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    optimizer = adamw_for(model, **settings) if handle is None else handle.optimizer(**settings)
    embedding = model.get_input_embeddings().weight
    for group in list(optimizer.param_groups):
        matrices = group.get("packed") or group["params"][0].ndim > 1
        if any(p is embedding for p in group["params"]):
            shared = {k: v for k, v in group.items() if k != "params"}
            group["params"] = [p for p in group["params"] if p is not embedding]
            optimizer.add_param_group(shared | {"params": [embedding], "lr": group["lr"] * EMBEDDING_LR})
        if matrices:
            group["lr"] *= MATRIX_LR * matrix_scale
    optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]
    return optimizer


def lr_factor(step: int, warm: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < warm:
        return (step + 1) / warm
    progress = torch.tensor((step - warm) / max(1, steps - warm) * torch.pi)
    return 0.1 + 0.45 * (1 + float(progress.cos()))


def batches(rows: Any, recipe: Recipe) -> Iterator[dict[str, Tensor]]:
    """The batches of a run: a pure function of the recipe's seed."""
    order = list(RowOrder(rows=len(rows), count=recipe.steps * recipe.batch_size, seed=recipe.seed))
    for first in range(0, len(order), recipe.batch_size):
        yield collate([rows[i] for i in order[first : first + recipe.batch_size]])


@torch.no_grad()
def probed(model: torch.nn.Module, batch: dict[str, Tensor]) -> float:
    """Loss on a fixed held-out batch."""
    return float(model(**batch, use_cache=False).loss)


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, gradients (as many bytes), buffers and optimizer state."""
    weights = sum(2 * p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    return weights + sum(
        s.nbytes for state in optimizer.state.values() for s in state.values() if isinstance(s, Tensor)
    )


def gathered(folder: Path, experiment: str, recipe: dict[str, Any], result: Path) -> None:
    """All runs of a folder in one file, each machine once."""
    runs = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    hosts = {json.dumps(r.pop("machine"), sort_keys=True) for r in runs}
    record = {"experiment": experiment, "recipe": recipe, "machines": [json.loads(h) for h in sorted(hosts)]}
    result.write_text(json.dumps(record | {"runs": runs}, separators=(",", ":")) + "\n")
