"""The registration of `bank_ffn` with `torch.library`, so that a compiled graph keeps it whole.

Named tuples are taken apart into lists of tensors. Eager calls do not come through here: the dispatcher costs some
30 µs, as much as a small model's whole FFN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops.bank_ffn.select import Int8Rows, Predictor, Weight


@torch.library.custom_op("fallow::bank_ffn", mutates_args=())
def forward(
    x: Tensor,
    kind: str,
    tensors: list[Tensor],
    tilt: Tensor | None,
    gate: str,
    weights: list[Tensor],
    act: str,
    bank: int,
    keep: int,
    backend: str | None,
) -> Tensor:
    """y [..., D]. `weights`: gate, up and down, or for int8 each followed by its scale."""
    from fallow.ops import bank_ffn as op

    given = [Int8Rows(*weights[i : i + 2]) for i in (0, 2, 4)] if len(weights) == 6 else weights
    predictor = Predictor(kind, tuple(tensors), tilt, gate)  # type: ignore[arg-type]
    return op.run(x, predictor, *given, act=act, bank=bank, keep=keep, backend=backend).clone()


@forward.register_fake
def _(x, kind, tensors, tilt, gate, weights, act, bank, keep, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def traced(
    x: Tensor, p: Predictor, weights: tuple[Weight, ...], act: str, bank: int, keep: int, backend: str | None
) -> Tensor:
    """The op as a node of the graph that is being traced."""
    flat = [t for w in weights for t in (w if isinstance(w, Int8Rows) else (w,))]
    return forward(x, p.kind, list(p.tensors), p.tilt_F, p.gate, flat, act, bank, keep, backend)
