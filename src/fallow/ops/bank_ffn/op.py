"""The registration of `bank_ffn` with `torch.library`, so that a compiled graph keeps it whole.

Named tuples are taken apart into lists of tensors. Registered without the wrappers of `torch.library.custom_op` (they
add autograd that the op has not, and 15 µs), and eager calls do not come through here at all: a small model's whole FFN
takes 50 µs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops.bank_ffn.select import Int8Rows, Predictor, Weight

_library = torch.library.Library("fallow", "FRAGMENT")
_library.define(
    "bank_ffn(Tensor x, str kind, Tensor[] tensors, Tensor? tilt, str gate, Tensor[] compensation, Tensor[] weights,"
    " str act, int bank, int keep, str? backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(
    x: Tensor,
    kind: str,
    tensors: list[Tensor],
    tilt: Tensor | None,
    gate: str,
    compensation: list[Tensor],
    weights: list[Tensor],
    act: str,
    bank: int,
    keep: int,
    backend: str | None,
) -> Tensor:
    """y [..., D]. `weights`: gate, up and down, or for int8 each followed by its scale."""
    from fallow.ops import bank_ffn as op

    given = [Int8Rows(*weights[i : i + 2]) for i in (0, 2, 4)] if len(weights) == 6 else weights
    predictor = Predictor(kind, tuple(tensors), tilt, gate, tuple(compensation) or None)  # type: ignore[arg-type]
    return op.run(x, predictor, *given, act=act, bank=bank, keep=keep, backend=backend)


def _fake(x, kind, tensors, tilt, gate, compensation, weights, act, bank, keep, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("bank_ffn", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fallow::bank_ffn", _fake, lib=_library)
forward = torch.ops.fallow.bank_ffn.default


def traced(
    x: Tensor, p: Predictor, weights: tuple[Weight, ...], act: str, bank: int, keep: int, backend: str | None
) -> Tensor:
    """The op as a node of the graph that is being traced."""
    flat = [t for w in weights for t in (w if isinstance(w, Int8Rows) else (w,))]
    stand_in = list(p.compensation or ())
    return forward(x, p.kind, list(p.tensors), p.tilt_F, p.gate, stand_in, flat, act, bank, keep, backend)
