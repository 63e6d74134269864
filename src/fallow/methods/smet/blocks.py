"""`BlockLinear`: a linear layer of square tiles, of which the dead ones are neither stored nor computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fallow.methods.smet import topology
from fallow.methods.smet.layers import Carry, SparseLinear, same_shapes, weight_gradient
from fallow.ops import packed
from fallow.ops.block_linear import Tiles, block_linear, tiles_of


class BlockLinear(SparseLinear):
    """Square tiles: values [N, b, b] in row-major order of the grid; inactive tiles are not computed."""

    def __init__(self, stock: nn.Module, weight_OI: Tensor, mask_RC: Tensor, *, block: int) -> None:
        super().__init__(stock, (weight_OI.shape[0], weight_OI.shape[1]), (mask_RC.shape[0], mask_RC.shape[1]))
        self.block = block
        mask_RC = mask_RC.to(weight_OI.device)
        tiles_RCbb = weight_OI.detach().unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)
        self.values = nn.Parameter(tiles_RCbb[mask_RC].contiguous())
        self.register_buffer("bitmap", packed.naive.pack_bits(mask_RC))
        self.refresh()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.refresh()  # the tiles' coordinates follow to the new device
        return self

    def refresh(self) -> None:
        self.tiles: Tiles = tiles_of(self.mask(), self.out_features, self.in_features, self.block)

    def forward(self, x: Tensor) -> Tensor:
        y = block_linear(x, self.values, self.tiles, self.bias)
        return self._watch(y, x)

    def densify(self, whole_values: Tensor) -> Tensor:
        b, mask_RC = self.block, self.mask()
        dense = whole_values.new_zeros(*self.grid, b, b)
        dense[mask_RC] = whole_values
        return dense.transpose(1, 2).reshape(self.shape)

    def growth_scores(self, dy_TO: Tensor, x_TI: Tensor) -> Tensor:
        (R, C), b = self.grid, self.block
        return weight_gradient(dy_TO, x_TI).abs_().view(R, b, C, b).mean((1, 3))

    def moved(
        self, values: Tensor, fraction: float, *, per_row: bool, g: torch.Generator, candidates: Tensor | None
    ) -> Tensor:
        alive_RC = self.mask()
        magnitude_RC = torch.zeros(self.grid, device=values.device)
        magnitude_RC[alive_RC] = values.float().abs().mean((1, 2))
        growth = None if candidates is None else packed.naive.unpack_bits(candidates, self.grid[1]).float()
        mask_RC = topology.move(alive_RC, magnitude_RC, fraction, per_row=per_row, g=g, growth_RC=growth)
        return packed.naive.pack_bits(mask_RC)

    def rebuild(self, bitmap: Tensor) -> Carry:
        before, after = self.mask(), packed.naive.unpack_bits(bitmap, self.grid[1])
        number = torch.full(self.grid, -1, dtype=torch.int64, device=before.device)
        number[before] = torch.arange(int(before.sum()), device=before.device)
        source_N = number[after]
        self.bitmap.copy_(bitmap)
        self.refresh()

        def carry(x: Tensor) -> Tensor:
            moved = x[source_N.clamp_min(0)]
            moved[source_N < 0] = 0
            return moved

        return carry

    def check(self, bitmap: Tensor, n_values: torch.Size, name: str) -> None:
        same_shapes(self, bitmap, n_values, name)
        packed.layout_from_bitmap(bitmap, self.grid[1], expected=n_values[0], name=name)
