"""The truth for `subset_linear`: index the weight, then `F.linear`, in plain autograd.

Its backward scatters the weight gradient with `index_put_(accumulate=True)` and keeps the gathered copy alive until
then; every other backend must match its value and each of its gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

name = "naive"


def available() -> tuple[bool, str]:
    return True, "plain PyTorch"


def usable(x: Tensor) -> tuple[bool, str]:
    return True, "works on every device and dtype"


def expand(index: Tensor, block: int) -> Tensor:
    """Indices of single rows from indices of blocks of `block` consecutive rows: int64 [K] -> [K·block]."""
    if block == 1:
        return index
    return (index[:, None] * block + torch.arange(block, device=index.device)).flatten()


def subset_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, rows: Tensor | None, cols: Tensor | None, *, block: int = 1
) -> Tensor:
    if rows is not None:
        kept = expand(rows, block)
        weight_OI = weight_OI[kept]
        bias_O = None if bias_O is None else bias_O[kept]
    elif cols is not None:
        weight_OI = weight_OI[:, expand(cols, block)]
    return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))
