"""Bytes of model state by kind, counted from the tensors in use, so that dense and sparse arms stand side by side.

A process's peak memory is what a user pays, but on a small model it is mostly PyTorch and activations. State is what
sparsity changes: the weights of the linear layers, their gradients and optimizer state, and the rest (embeddings, head,
norms and biases, each with its own). It is counted inside the optimizer step, after the update and before gradients are
freed: everything is alive then, so no byte here is predicted. Cost: one look at each tensor's size, on logged steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fallow.method import Method
from fallow.training import checkpoint

KINDS: tuple[str, ...] = ("weights", "gradients", "moments", "masters", "clocks", "topology")


def count(model: PreTrainedModel, optimizer: torch.optim.Optimizer, sparsity: Method | None) -> dict[str, Any]:
    """Bytes held by this process now; call it while gradients exist.

    Returns:
        `layers`: the linear layers by kind (weights, gradients, moments, masters, clocks, topology); `layers_total`;
        `rest`; `total` of both. Of a method that keeps its own account also `layers_dense` (the same layers under dense
        AdamW), `ratio` of `layers_total` to it, `predicted` (by kind) and `scratch` (shared buffers, in no total).
    """
    own = sparsity.memory() if sparsity is not None else {}
    if own:
        layers, rest = dict(own["sparse"]), own["rest"]
    else:
        layers, rest = _by_kind(model, optimizer)
    total = sum(layers.values())
    found = {"layers": layers, "layers_total": total, "rest": rest, "total": total + rest}
    for theirs, ours in (("sparse_dense", "layers_dense"), ("ratio", "ratio"), ("predicted", "predicted")):
        if theirs in own:
            found[ours] = own[theirs]
    return found | {"scratch": own.get("scratch", 0)}


def files(checkpoints: Path, model: Path) -> dict[str, int]:
    """Bytes on disk: `checkpoint` (the newest, all files), its `checkpoint_weights` and `checkpoint_optimizer`, and
    `model` (the trained model's weights). What was not saved is left out."""
    found: dict[str, int] = {}
    saved = sorted(checkpoints.glob("checkpoint-*"), key=checkpoint.step_of)
    if saved:
        found["checkpoint"] = _sizes(saved[-1], "*")
        found["checkpoint_weights"] = _sizes(saved[-1], "*.safetensors")
        found["checkpoint_optimizer"] = _sizes(saved[-1], "optimizer.*")
    if model.is_dir():
        found["model"] = _sizes(model, "*.safetensors")
    return found


def _by_kind(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> tuple[dict[str, int], int]:
    """(layers by kind, rest). Layers are matrices that are neither embeddings nor the head."""
    layers: dict[str, int] = dict.fromkeys(KINDS, 0)
    rest = 0
    apart = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    apart |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    for p in model.parameters():
        state = {k: s for k, s in optimizer.state.get(p, {}).items() if isinstance(s, Tensor)}
        gradient = 0 if p.grad is None else p.grad.nbytes
        if p.ndim < 2 or id(p) in apart:
            rest += p.nbytes + gradient + sum(s.nbytes for s in state.values())
            continue
        layers["weights"] += p.nbytes
        layers["gradients"] += gradient
        for name, s in state.items():
            if s.ndim:
                layers[_kind(name, s)] += s.nbytes
    return layers, rest


def _kind(name: str, state: Tensor) -> str:
    if name == "master":
        return "masters"
    return "moments" if state.is_floating_point() else "clocks"


def _sizes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())
