"""`row_linear`: linears of one to eight rows of x, as in decoding, where the time is that of reading the weights.

    y = [x W_0ᵀ + b_0, x W_1ᵀ + b_1, …]        x is [.., I], W_i is [O_i, I], y is [.., sum of O_i]

Several linears of the same x are one call: a call costs 10 µs, and small weights are read in less. The obvious
alternative, `F.linear`, goes to oneDNN, whose blocked product of one bf16 row reads memory at 50 to 70 % of its speed.
Ours; inference only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fallow.errors import BackendError, ConfigError
from fallow.ops.row_linear import cpu, naive

BACKENDS = [cpu, naive]
last_used = "none"

__all__ = ["BACKENDS", "last_used", "row_linear"]


def row_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, backend: str | None = None
) -> Tensor:
    """Linears of the same input, side by side.

    Args:
        x: [..., I], floating.
        weights: each [O_i, I], dtype of x; its rows, or its columns, each in one piece.
        biases: as many, each [O_i] or None.
        backend: "cpu" or "naive"; None takes the first that can run.

    Returns:
        [..., sum of O_i], dtype of x; sums in fp32. No gradients.

    Raises:
        ConfigError: a shape does not fit.
        BackendError: the backend asked for is unknown or cannot run here.
    """
    global last_used
    for w in weights:
        if w.shape[1] != x.shape[-1]:
            raise ConfigError(f"row_linear: x is [..., {x.shape[-1]}], a weight is {list(w.shape)}; widths must agree")
    module = _choose(x, weights, biases, backend)
    last_used = module.name
    return module.row_linear(x, weights, biases)


def _choose(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], backend: str | None):
    if backend is None:
        return next(b for b in BACKENDS if b.available()[0] and b.usable(x, weights, biases)[0])
    named = {b.name: b for b in BACKENDS}
    if backend not in named:
        raise BackendError(f"row_linear has no backend {backend!r}; it has {', '.join(named)}")
    for ok, reason in (named[backend].available(), named[backend].usable(x, weights, biases)):
        if not ok:
            raise BackendError(f"row_linear: backend {backend!r} cannot run: {reason}; use backend='naive'")
    return named[backend]


# Not `torch.library.custom_op`: its wrapper costs some 20 µs a call, more than a small model's linears.
_library = torch.library.Library("fallow", "FRAGMENT")
_library.define("row_linear(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor")


def _registered(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """What graphs call, whose shapes have been checked: some hundred times a token."""
    global last_used
    if cpu.serves(x, weights, biases):
        last_used = cpu.name
        return cpu.row_linear(x, weights, biases)
    return row_linear(x, weights, biases)


_library.impl("row_linear", _registered, "CompositeExplicitAutograd")


@torch.library.register_fake("fallow::row_linear", lib=_library)
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in weights))
