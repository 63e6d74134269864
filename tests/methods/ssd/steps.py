"""Tiny ReLU models and their training steps, shared by the tests of SSD."""

from __future__ import annotations

from typing import Any

import torch
from tests.tiny_models import tiny_model

import fallow
from fallow import SSD

RELU = {"llama": {"hidden_act": "relu"}, "opt": {}, "arcee": {}}
"""Gated ReLU, two matrices with ReLU, two matrices with its square; what to say so that the tiny model has it."""

SWITCHING: dict[str, Any] = {
    "experts": 4,
    "active": 2,
    "dense_start": 0.1,
    "monitor_every": 1,
    "similarity": -1.0,
    "zeros": 0.0,
    "patience": 1,
    "sparse_share": 0.2,
    "dense_share": 0.1,
    "end_share": 0.2,
}
"""Adaptive, with thresholds that make it switch to and fro in 30 steps."""


def batch(seed: int = 0, n: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 128, (n, length), generator=torch.Generator().manual_seed(seed))


def made(family: str = "llama", *, dtype: torch.dtype = torch.float32, watch: bool = True, **settings: Any) -> Any:
    """(model, handle), with a batch to watch."""
    model = tiny_model(family, dtype=dtype, **RELU[family])
    handle: Any = fallow.sparsify(model, SSD(**({"experts": 4, "active": 2} | settings)))
    if watch:
        handle.watch({"input_ids": batch(99, n=4)})
    return model, handle


def train(
    model: Any, handle: Any, optimizer: Any, first: int, last: int, total: int, *, clip: float | None = None
) -> list[float]:
    """Losses of steps `first` to `last` - 1."""
    losses = []
    for step in range(first, last):
        handle.before_step(step, total)
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        handle.after_step(step, total)
        model.zero_grad()  # as transformers' Trainer does it
        losses.append(float(loss.detach()))
    return losses


def logits(model: Any, seed: int = 5) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch(seed)).logits.clone()


def evaluated(model: Any, seed: int = 5) -> torch.Tensor:
    model.eval()
    found = logits(model, seed)
    model.train()
    return found


def phases(handle: Any) -> str:
    """One letter per log entry."""
    return "".join(entry.phase[0] for entry in handle.log)
