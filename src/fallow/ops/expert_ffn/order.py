"""`Order`: the rows of an expert FFN, one per token and chosen expert, sorted by expert.

Each expert's rows start at a multiple of `pad`, so that the sizes of its GEMMs come from a short list: oneDNN compiles
a bf16 GEMM anew for every size it has not met (1 to 2 ms, against 0.15 ms for running it), and routing changes all
sizes at every step. The rows in between are computed as tokens of zeros and read by nobody.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Order(NamedTuple):
    """All int64. Tensors have static sizes, so that a compiled graph can hold them."""

    start_E1: Tensor
    """[E+1]: first row of each expert; the last is the number of rows in use."""
    count_E: Tensor
    """[E]: tokens of each expert."""
    token_R: Tensor
    """[T·K + E·(pad - 1)]: token of each row; arbitrary in the rows between experts."""
    slot_TK: Tensor
    """[T, K]: the row of each choice."""


def empty_order(choice_TK: Tensor, experts: int, pad: int) -> Order:
    """An uninitialised order for the choices [T, K], on their device."""
    rows = choice_TK.numel() + experts * (pad - 1)
    new = choice_TK.new_empty
    return Order(new(experts + 1), new(experts), new(rows), new(choice_TK.shape))
