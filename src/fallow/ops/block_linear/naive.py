"""The truth for `block_linear`: the dense weight, zero where no tile is, in plain autograd.

It saves no work; every other backend must match its value and each of its gradients.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fallow.ops.block_linear.tiles import Tiles

name = "naive"


def available() -> tuple[bool, str]:
    return True, "plain PyTorch"


def usable(x: Tensor, tiles: Tiles) -> tuple[bool, str]:
    return True, "works on every device and dtype"


def dense(values_Nbb: Tensor, tiles: Tiles) -> Tensor:
    """The weight [out, in_], dtype of the values; what tiles hold beyond its edges is cut off."""
    (R, C), b = tiles.grid, tiles.block
    place_N = tiles.rows_N.long() * C + tiles.cols_N.long()
    tiles_RCbb = values_Nbb.new_zeros(R * C, b, b).index_copy(0, place_N, values_Nbb).view(R, C, b, b)
    return tiles_RCbb.transpose(1, 2).reshape(R * b, C * b)[: tiles.out, : tiles.in_]


def block_linear(x: Tensor, values_Nbb: Tensor, tiles: Tiles, bias_O: Tensor | None) -> Tensor:
    return F.linear(x, dense(values_Nbb, tiles), bias_O)
