"""`Layout`: which entries of a matrix [O, I] are stored, as one bit each, with the row offsets the kernels need.

The obvious alternative, an index per active entry (CSR), costs 4 bytes of metadata per entry: at density 0.5 that is
two bytes per weight, sixteen times as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.errors import CheckpointError, ConfigError
from fallow.ops.packed import naive


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The active entries of one matrix."""

    bitmap_OB: Tensor
    """uint8 [O, ceil(I/8)]; bit j of byte i is column 8i+j, bits past the last column are 0."""
    start_O1: Tensor
    """int64 [O+1]: where each row's entries start in the packed vector; the last is their number."""
    n_in: int
    """I."""
    n_active: int
    """Active entries."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.bitmap_OB.shape[0], self.n_in

    def mask(self) -> Tensor:
        """bool [O, I]."""
        return naive.unpack_bits(self.bitmap_OB, self.n_in)


def layout_of(mask_OI: Tensor) -> Layout:
    """The layout of a bool [O, I] mask. Raises ConfigError when it is no such mask."""
    if mask_OI.dim() != 2 or mask_OI.dtype != torch.bool:
        raise ConfigError(f"a layout needs a bool matrix, not {mask_OI.dtype} {tuple(mask_OI.shape)}")
    return layout_from_bitmap(naive.pack_bits(mask_OI), mask_OI.shape[1])


def layout_from_bitmap(bitmap_OB: Tensor, n_in: int, *, expected: int | None = None, name: str = "bitmap") -> Layout:
    """The layout of a bitmap that was stored.

    Raises:
        CheckpointError: it has not `expected` active entries, or bits beyond the last column: it is corrupt, or of
            another density.
    """
    if bitmap_OB.dtype != torch.uint8 or bitmap_OB.dim() != 2 or bitmap_OB.shape[1] != -(-n_in // 8):
        raise CheckpointError(
            f"{name}: wanted uint8 [O, {-(-n_in // 8)}] for {n_in} inputs, found {bitmap_OB.dtype}"
            f" {tuple(bitmap_OB.shape)}; it is of another model"
        )
    if n_in % 8 and bool((bitmap_OB[:, -1] >> (n_in % 8)).any()):
        raise CheckpointError(f"{name} is corrupt: bits are set beyond the last of {n_in} columns")
    counts_O = _POPCOUNT.to(bitmap_OB.device)[bitmap_OB.long()].sum(1)
    start_O1 = torch.zeros(bitmap_OB.shape[0] + 1, dtype=torch.int64, device=bitmap_OB.device)
    torch.cumsum(counts_O, 0, out=start_O1[1:])
    n_active = int(start_O1[-1])
    if expected is not None and n_active != expected:
        raise CheckpointError(
            f"{name} marks {n_active} active weights, but {expected} values are stored: it is corrupt, or of another"
            " density; resume with the recipe that wrote it, or from an earlier checkpoint"
        )
    return Layout(bitmap_OB.contiguous(), start_O1, n_in, n_active)


_POPCOUNT = torch.tensor([bin(b).count("1") for b in range(256)])
