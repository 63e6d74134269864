"""`row_linear` as torch's own linears: the truth, and what runs where the compiled kernel cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

name = "naive"


def available() -> tuple[bool, str]:
    return True, "torch's linears"


def usable(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[bool, str]:
    return True, "works on every device and dtype"


def row_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Arguments as `fallow.ops.row_linear.row_linear`."""
    parts = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
