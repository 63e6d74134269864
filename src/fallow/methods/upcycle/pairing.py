"""Both modes in one pass: the batch twice, its first half computed dense and its second sparse.

So the dense mode learns from the text and the sparse mode from the dense one, on the same weights and in one step
(in-place distillation: Yu and Huang, "Universally Slimmable Networks", arXiv 1903.05134). One pass rather than two, so
that gradient checkpointing computes in its second forward what it did in its first.
Cost: twice the step's time and activations, and no parent in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fallow.errors import ConfigError

_BY_ROW = ("input_ids", "attention_mask", "position_ids", "labels")
_WHOLE = ("num_items_in_batch", "use_cache", "return_dict", "output_attentions", "output_hidden_states")
IGNORED = -100


def twice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call of a model on [B, T] as one on [2B, T]; the second half has no labels.

    Raises:
        ConfigError: an input that cannot be doubled without knowing what it is.
    """
    if len(args) > 1:
        raise ConfigError("Upcycle: teacher='self' needs the model's inputs by name, such as input_ids=…")
    given = dict(zip(("input_ids",), args, strict=False)) | kwargs
    for name, value in given.items():
        if isinstance(value, Tensor) and name in _BY_ROW:
            again = torch.full_like(value, IGNORED) if name == "labels" else value
            given[name] = torch.cat([value, again])
        elif value is not None and name not in _WHOLE:
            raise ConfigError(f"Upcycle: teacher='self' computes a batch twice and cannot double the input {name!r}")
    return (), given


def halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """(dense, without gradient, and sparse) of something by row of such a call."""
    dense, sparse = both.chunk(2)
    return dense.detach(), sparse
