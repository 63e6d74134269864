"""`Tiles`: which tiles of a weight's grid are there, row by row and column by column.

Forward and weight gradients walk the grid by rows, the input gradient by columns; both orders are made once, when the
topology changes, and not searched for at each step. Cost: 16 bytes a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """The active tiles of a weight [out, in_] cut into tiles [block, block]; all tensors are int32."""

    out: int
    """Rows of the weight; the last row of tiles may reach beyond them."""
    in_: int
    """Columns of the weight; the last column of tiles may reach beyond them."""
    block: int
    """Side of a tile, a multiple of 16."""
    rows_N: Tensor
    """Row in the grid of each tile; tiles are numbered row by row."""
    cols_N: Tensor
    """Column in the grid of each tile."""
    row_start: Tensor
    """[R+1]: number of the first tile of each grid row; the last is N."""
    col_start: Tensor
    """[C+1]: where each grid column starts in `col_order`; the last is N."""
    col_order: Tensor
    """[N]: tile numbers sorted by column, then by row."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.out // self.block), -(-self.in_ // self.block)

    @property
    def shape(self) -> tuple[int, int, int]:
        """What `values` must look like: [N, block, block]."""
        return self.rows_N.shape[0], self.block, self.block


def tiles_of(mask_RC: Tensor, out: int, in_: int, block: int) -> Tiles:
    """The tiles that a mask marks, on the mask's device.

    Args:
        mask_RC: bool [ceil(out/block), ceil(in_/block)].
        out, in_: size of the weight.
        block: side of a tile, a multiple of 16.

    Raises:
        ConfigError: the mask is not bool or not of this shape, or a size is out of range.
    """
    if block < 16 or block % 16:
        raise ConfigError(f"block_linear: block={block} is not a positive multiple of 16")
    if out < 1 or in_ < 1:
        raise ConfigError(f"block_linear: a weight [{out}, {in_}] has no entries")
    grid = (-(-out // block), -(-in_ // block))
    if mask_RC.dtype != torch.bool or tuple(mask_RC.shape) != grid:
        raise ConfigError(
            f"block_linear: a weight [{out}, {in_}] in tiles of {block} needs a bool mask {list(grid)}, not"
            f" {mask_RC.dtype} {list(mask_RC.shape)}"
        )
    rows_N, cols_N = mask_RC.nonzero().unbind(1)
    return Tiles(
        out,
        in_,
        block,
        rows_N.int(),
        cols_N.int(),
        _starts(mask_RC.sum(1)),
        _starts(mask_RC.sum(0)),
        torch.sort(cols_N, stable=True).indices.int(),
    )


def _starts(counts: Tensor) -> Tensor:
    """[n+1] offsets of n groups."""
    start = torch.zeros(counts.shape[0] + 1, dtype=torch.int32, device=counts.device)
    start[1:] = counts.cumsum(0)
    return start
