"""Packed sparse weights in plain PyTorch: the truth for every other backend.

`mask[O, I]` is unpacked from the bitmap and used as a boolean index, whose order is row-major. Cost: eight bytes of
index traffic per weight; the native kernels read one bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "naive"


def available() -> tuple[bool, str]:
    """Always usable: plain PyTorch on any device."""
    return True, "plain PyTorch"


def usable(x: Tensor) -> tuple[bool, str]:
    """Whether tensors like `x` can be served here, and why not."""
    return True, ""


def pack_bits(mask_OI: Tensor) -> Tensor:
    """uint8 [O, ceil(I/8)] of a bool [O, I]; bit j of byte i is column 8i+j, bits past the last column are 0."""
    n_out, n_in = mask_OI.shape
    padded = torch.zeros(n_out, -(-n_in // 8) * 8, dtype=torch.uint8, device=mask_OI.device)
    padded[:, :n_in] = mask_OI
    weights = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=mask_OI.device)
    return (padded.view(n_out, -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmap_OB: Tensor, n_in: int) -> Tensor:
    """bool [O, n_in] of `pack_bits(...)`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap_OB.device)
    bits = (bitmap_OB[:, :, None] >> shifts) & 1
    return bits.view(bitmap_OB.shape[0], -1)[:, :n_in].bool()


def expand(values: Tensor, bitmap_OB: Tensor, start_O1: Tensor, out_OI: Tensor) -> None:
    """Write the dense matrix of packed `values` into `out_OI`, zeros where inactive."""
    mask_OI = unpack_bits(bitmap_OB, out_OI.shape[1])
    out_OI.zero_()
    out_OI[mask_OI] = values.reshape(-1)


def compress(dense_OI: Tensor, bitmap_OB: Tensor, start_O1: Tensor, out: Tensor) -> None:
    """Write the active entries of `dense_OI` into `out`, row-major."""
    out.view(-1).copy_(dense_OI[unpack_bits(bitmap_OB, dense_OI.shape[1])])
