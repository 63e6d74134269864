"""`subset_linear` as one gather and one GEMM per direction; runs on any device, made for CPUs.

Indexing under autograd (`weight[rows]`) keeps the gathered copy until backward and scatters its gradient row by row
with `index_put_(accumulate=True)`. Here the slice is gathered into a reused buffer, gathered again in backward (a copy
costs about 1/T of the GEMM it feeds), and the weight gradient is one GEMM on the slice, copied into the kept rows or
columns of a zero gradient. An index may name blocks of consecutive rows (a head is `head_dim` of them): a column gather
then copies `head_dim` numbers at a time instead of one. Gathers follow the memory order of the weight, so Conv1D's
transposed view costs no more than a Linear.

Cost for T tokens, K kept of O rows: 6·T·K·I FLOPs, 2·K·I numbers copied for the slices and K·I for the gradient.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fallow.ops.subset_linear.naive import expand

name = "cpu"
_local = threading.local()


def available() -> tuple[bool, str]:
    return True, "GEMMs on gathered rows"


def usable(x: Tensor) -> tuple[bool, str]:
    if x.device.type == "meta":
        return False, "meta tensors hold no values"
    return True, "GEMMs on gathered rows (any device)"


def _gather(weight_OI: Tensor, index: Tensor, block: int, dim: int) -> Tensor:
    """The kept rows (dim 0: [K·block, I]) or columns (dim 1: [O, K·block]), in the weight's own memory order.

    On CPU the result lives in a buffer that the next call reuses: it must be consumed before returning.
    """
    if weight_OI.stride(0) < weight_OI.stride(1):
        return _gather(weight_OI.t(), index, block, 1 - dim).t()
    blocks = weight_OI.unflatten(dim, (-1, block))
    shape = list(blocks.shape)
    shape[dim] = len(index)
    out = torch.index_select(blocks, dim, index, out=_scratch(shape, weight_OI))
    return out.flatten(dim, dim + 1)


def _scratch(shape: list[int], like: Tensor) -> Tensor:
    """Memory for a gather: on CPU one growing buffer per thread and dtype, elsewhere the caching allocator's."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    buffers = _local.__dict__.setdefault("buffers", {})
    n = 1
    for size in shape:
        n *= size
    flat = buffers.get(like.dtype)
    if flat is None or flat.numel() < n:
        flat = buffers[like.dtype] = like.new_empty(n)
    return flat[:n].view(shape)


@torch.library.custom_op("fallow::subset_linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, block: int, dim: int) -> Tensor:
    """x [T, I'] -> y [T, O']: dim 0 keeps the rows of `weight` in `index` (blocks of `block`), dim 1 its columns."""
    w_t = _gather(weight, index, block, dim).t().to(x.dtype)
    if bias is None:
        return torch.mm(x, w_t)
    kept_bias = bias.index_select(0, expand(index, block)) if dim == 0 else bias
    return torch.addmm(kept_bias.to(x.dtype), x, w_t)


@_forward.register_fake
def _(x, weight, bias, index, block, dim):
    return x.new_empty(x.shape[0], index.shape[0] * block if dim == 0 else weight.shape[0])


@torch.library.custom_op("fallow::subset_linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, index: Tensor, block: int, dim: int, need_dx: bool, need_dw: bool
) -> list[Tensor]:
    """[dx, dw]; what was not asked for is an empty tensor. `dw` has the weight's shape, dtype and memory order."""
    dx = torch.mm(dy, _gather(weight, index, block, dim).to(dy.dtype)) if need_dx else x.new_empty(0)
    if not need_dw:
        return [dx, weight.new_empty(0)]
    dw = torch.zeros_like(weight)
    part = torch.mm(dy.t(), x).to(weight.dtype)
    dw.unflatten(dim, (-1, block)).index_copy_(dim, index, part.unflatten(dim, (-1, block)))
    return [dx, dw]


@_backward.register_fake
def _(dy, x, weight, index, block, dim, need_dx, need_dw):
    dx = dy.new_empty(x.shape) if need_dx else x.new_empty(0)
    return [dx, torch.empty_like(weight) if need_dw else weight.new_empty(0)]


def _setup(ctx, inputs, output):
    x, weight, bias, index, block, dim = inputs
    ctx.save_for_backward(x, weight, index)
    ctx.block, ctx.dim = block, dim
    ctx.bias = None if bias is None else (bias.shape[0], bias.dtype)


def _autograd(ctx, dy):
    x, weight, index = ctx.saved_tensors
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    dx, dw = _backward(dy, x, weight, index, ctx.block, ctx.dim, need_dx, need_dw)
    db = None
    if ctx.bias is not None and need_db:
        size, dtype = ctx.bias
        db = dy.sum(0).to(dtype)
        if ctx.dim == 0:
            db = db.new_zeros(size).index_copy(0, expand(index, ctx.block), db)
    return dx if need_dx else None, dw if need_dw else None, db, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def subset_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, rows: Tensor | None, cols: Tensor | None, *, block: int = 1
) -> Tensor:
    index, dim = (rows, 0) if rows is not None else (cols, 1)
    if index is None:
        return torch.nn.functional.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))
    y = _forward(x.reshape(-1, x.shape[-1]), weight_OI, bias_O, index, block, dim)
    return y.view(*x.shape[:-1], y.shape[-1])
