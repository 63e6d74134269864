"""Where a SMET model's bytes are, counted from its tensors, beside those of the same model under dense AdamW.

What is predicted from (shapes, density, dtype) and what is counted from tensors in use agree to the byte; a test holds
them together. Activations are not state: the training run measures the process's peak for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fallow.methods.smet.config import SMET
from fallow.methods.smet.layers import PackedLinear, SparseLinear
from fallow.ops.packed import scratch_bytes
from fallow.shards import local

KINDS = ("weights", "gradients", "moments", "masters", "clocks", "topology")


def predict(n_weights: int, density: float, *, weight_bytes: int, state_dtype: str, moving: bool) -> dict[str, int]:
    """Bytes of one sparse layer of `n_weights` weights, by kind, gradients held.

    Args:
        n_weights: O · I.
        density: share alive.
        weight_bytes: 4 for fp32, 2 for bf16 weights.
        state_dtype: as in `SMET`.
        moving: the topology moves and clocks are local, so every active weight has an age byte.
    """
    active = round(n_weights * density)
    moment = 4 if state_dtype == "fp32" else 2
    return {
        "weights": weight_bytes * active,
        "gradients": weight_bytes * active,
        "moments": 2 * moment * active,
        "masters": 4 * active if weight_bytes == 2 and state_dtype == "fp32" else 0,
        "clocks": active if moving else 0,
        "topology": -(-n_weights // 8),
    }


def dense_bytes(n_weights: int, weight_bytes: int) -> int:
    """Bytes of the same weights under dense AdamW with fp32 state: 16 a weight, masters included."""
    return n_weights * (weight_bytes * 2 + 8 + (4 if weight_bytes == 2 else 0))


def predicted(layers: list[SparseLinear], config: SMET) -> dict[str, int]:
    """`predict` over a model's layers, as stored: every row's bitmap ends on a byte, and rows of single weights have an
    offset of 8 bytes. Gradients held and the topology moved at least once; on this rank."""
    total: dict[str, int] = dict.fromkeys(KINDS, 0)
    for layer in layers:
        n = layer.out_features * layer.in_features
        part = predict(
            n,
            local(layer.values).numel() / n,
            weight_bytes=layer.values.element_size(),
            state_dtype=config.state_dtype,
            moving=config.update_every > 0 and config.local_clock,
        )
        rows, columns = layer.grid
        part["topology"] = rows * -(-columns // 8) + (8 * (rows + 1) if isinstance(layer, PackedLinear) else 0)
        total = {kind: total[kind] + part[kind] for kind in KINDS}
    return total


def account(
    model: nn.Module, layers: list[SparseLinear], optimizer: torch.optim.Optimizer | None, config: SMET
) -> dict[str, Any]:
    """Bytes held on this rank now. Gradients that `zero_grad` has freed are not there to be counted: call it between
    `backward` and `zero_grad`, or take them from `predicted`.

    Returns:
        `sparse`: bytes of the sparse layers by kind; `sparse_dense`: of the same layers under dense AdamW; `ratio` of
        the two; `predicted`: of the sparse layers by kind, gradients held; `rest`: embeddings, head and norms with
        their state; `scratch`: the shared dense buffers.
    """
    sparse = dict.fromkeys(KINDS, 0)
    dense = 0
    for layer in layers:
        v = layer.values
        sparse["weights"] += _bytes(v)
        sparse["gradients"] += _bytes(v.grad)
        sparse["topology"] += sum(_bytes(b) for b in layer.buffers(recurse=False))
        state = optimizer.state.get(v, {}) if optimizer is not None else {}
        sparse["moments"] += _bytes(state.get("exp_avg")) + _bytes(state.get("exp_avg_sq"))
        sparse["masters"] += _bytes(state.get("master"))
        sparse["clocks"] += _bytes(state.get("age"))
        share = local(v).numel() / v.numel()
        dense += round(share * dense_bytes(layer.out_features * layer.in_features, v.element_size()))
    own = {id(layer.values) for layer in layers}
    rest = 0
    for p in model.parameters():
        if id(p) not in own:
            state = optimizer.state.get(p, {}) if optimizer is not None else {}
            rest += _bytes(p) + _bytes(p.grad) + sum(_bytes(s) for s in state.values() if isinstance(s, Tensor))
    total = sum(sparse.values())
    return {
        "sparse": sparse,
        "sparse_total": total,
        "sparse_dense": dense,
        "ratio": total / dense,
        "predicted": predicted(layers, config),
        "rest": rest,
        "scratch": scratch_bytes(),
    }


def _bytes(x: Tensor | None) -> int:
    return 0 if x is None else local(x).nbytes
