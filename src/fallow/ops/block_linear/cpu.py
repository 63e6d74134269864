"""`block_linear` through native/block.cpp (on AMX native/block_amx.cpp): inactive tiles are neither read nor
multiplied, in all three products.

The obvious alternative, one small GEMM per tile through torch, packs its operands anew for each tile and starts a
parallel region each time. Here x and dy are packed for many tiles at once. Sums are fp32 and rounded once. bf16 tiles
whose side is a multiple of 32 are multiplied on AMX where CPU and operating system have it, all else with fp32 FMAs.
Workspace: 24 MB forward, 48 MB backward, and with bf16 4 bytes per value for the sums of the tile gradients; on AMX
2 bytes per value and 24 MB of dy, plus about 3 MB per thread.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from fallow.ops import native
from fallow.ops.block_linear.tiles import Tiles

name = "cpu"

_BEST = -1


class _Grid(ctypes.Structure):
    """`fallow::BlockGrid`."""

    _fields_ = (
        ("rows", c_void_p),
        ("cols", c_void_p),
        ("row_start", c_void_p),
        ("col_start", c_void_p),
        ("col_order", c_void_p),
        ("n", c_int64),
        ("out", c_int64),
        ("in_", c_int64),
        ("block", c_int64),
    )


@torch.compiler.assume_constant_result  # the compiler cannot look into loading a library
def available() -> tuple[bool, str]:
    """Whether the compiled kernels are there, and why not."""
    return native.available()


def usable(x: Tensor, tiles: Tiles) -> tuple[bool, str]:
    """Whether `x` can be served here, and why not."""
    if x.device.type != "cpu" or tiles.rows_N.device.type != "cpu":
        return False, f"tensors on {x.device}, tiles on {tiles.rows_N.device}"
    if x.dtype not in (torch.bfloat16, torch.float32):
        return False, f"{x.dtype}; served are bfloat16 and float32"
    return True, "tiles of bfloat16 or float32 on CPU"


def forward(
    x_TI: Tensor, values_Nbb: Tensor, bias_O: Tensor | None, index: list[Tensor], size: list[int], level: int = _BEST
) -> Tensor:
    """y [T, out]. `index`: rows_N to col_order of `Tiles`; `size`: out, in_, block. `level` 0, 1, 2, 3 asks for plain
    C++, AVX2, AVX-512 or AMX (bf16 only), as far as this CPU has it."""
    x_TI, values_Nbb = x_TI.contiguous(), values_Nbb.contiguous()
    y_TO = x_TI.new_empty(x_TI.shape[0], size[0])
    padded = None
    if bias_O is not None:
        padded = torch.zeros(-(-size[0] // size[2]) * size[2])
        padded[: size[0]] = bias_O
    native.library().fallow_block_forward(
        ctypes.byref(_grid(index, size)),
        *(_address(t) for t in (values_Nbb, x_TI, padded, y_TO)),
        x_TI.shape[0],
        x_TI.dtype == torch.bfloat16,
        torch.get_num_threads(),
        level,
    )
    return y_TO


def backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    values_Nbb: Tensor,
    index: list[Tensor],
    size: list[int],
    need_dx: bool,
    need_dvalues: bool,
    level: int = _BEST,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [T, in_] and dvalues [N, b, b], each where it is asked for; arguments as in `forward`."""
    dy_TO, x_TI, values_Nbb = dy_TO.contiguous(), x_TI.contiguous(), values_Nbb.contiguous()
    dx_TI = torch.empty_like(x_TI) if need_dx else None
    dvalues_Nbb = torch.empty_like(values_Nbb) if need_dvalues else None
    if x_TI.shape[0] == 0:
        return dx_TI, None if dvalues_Nbb is None else dvalues_Nbb.zero_()
    native.library().fallow_block_backward(
        ctypes.byref(_grid(index, size)),
        *(_address(t) for t in (values_Nbb, x_TI, dy_TO, dx_TI, dvalues_Nbb)),
        x_TI.shape[0],
        x_TI.dtype == torch.bfloat16,
        torch.get_num_threads(),
        level,
    )
    return dx_TI, dvalues_Nbb


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _grid(index: list[Tensor], size: list[int]) -> _Grid:
    return _Grid(*(t.data_ptr() for t in index), index[0].shape[0], *size)
