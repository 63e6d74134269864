"""The registration of `block_linear` with `torch.library`, once for every backend that has kernels of its own.

A backend gives `forward` and `backward` on tensors (cpu.py says what of); its name is an argument of the op, so that a
compiled graph keeps the choice that was made outside of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops.block_linear import cpu, triton
from fallow.ops.block_linear.tiles import Tiles

_KERNELS = {backend.name: backend for backend in (cpu, triton)}


@torch.library.custom_op("fallow::block_linear", mutates_args=())
def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: list[Tensor], size: list[int], backend: str
) -> Tensor:
    return _KERNELS[backend].forward(x, values, bias, index, size)


@forward.register_fake
def _(x, values, bias, index, size, backend):
    return x.new_empty(x.shape[0], size[0])


@torch.library.custom_op("fallow::block_linear_backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: list[Tensor],
    size: list[int],
    backend: str,
    need_dx: bool,
    need_dvalues: bool,
) -> list[Tensor]:
    """[dx, dvalues]; what was not asked for is an empty tensor."""
    found = _KERNELS[backend].backward(dy, x, values, index, size, need_dx, need_dvalues)
    return [x.new_empty(0) if t is None else t for t in found]


@backward.register_fake
def _(dy, x, values, index, size, backend, need_dx, need_dvalues):
    return [
        x.new_empty(x.shape) if need_dx else x.new_empty(0),
        values.new_empty(values.shape) if need_dvalues else x.new_empty(0),
    ]


def _setup(ctx, inputs, output):
    x, values, bias, index, ctx.size, ctx.backend = inputs
    ctx.save_for_backward(x, values, *index)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd(ctx, dy):
    x, values, *index = ctx.saved_tensors
    need_dx, need_dvalues, need_db = ctx.needs_input_grad[:3]
    dx = dvalues = None
    if need_dx or need_dvalues:
        dx, dvalues = backward(dy, x, values, index, ctx.size, ctx.backend, need_dx, need_dvalues)
    db = dy.sum(0).to(ctx.bias_dtype) if need_db and ctx.bias_dtype is not None else None
    return dx if need_dx else None, dvalues if need_dvalues else None, db, [None] * len(index), None, None


forward.register_autograd(_autograd, setup_context=_setup)


def run(x: Tensor, values_Nbb: Tensor, tiles: Tiles, bias_O: Tensor | None, backend: str) -> Tensor:
    """y [..., out] of x [..., in_] through the named backend."""
    index = [tiles.rows_N, tiles.cols_N, tiles.row_start, tiles.col_start, tiles.col_order]
    size = [tiles.out, tiles.in_, tiles.block]
    return forward(x.reshape(-1, tiles.in_), values_Nbb, bias_O, index, size, backend).view(*x.shape[:-1], tiles.out)
