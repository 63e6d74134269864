"""`block_linear`: a linear layer whose weight is a grid of tiles, of which only the active ones are computed.

    y = x Wᵀ + b        W[r·b : (r+1)·b, c·b : (c+1)·b] = values[n] for the n-th active tile (r, c), else 0

FLOPs of forward, input gradient and weight gradient fall with the share of active tiles. The weight need not be a
multiple of the tile: what an edge tile holds beyond it counts as zero and gets gradient zero. Source: ours, for block
topologies of SMET (arXiv 2606.00888); the obvious alternative, a masked dense layer, saves nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.errors import BackendError, ConfigError
from fallow.ops.block_linear import cpu, naive, op, triton
from fallow.ops.block_linear.tiles import Tiles, tiles_of

BACKENDS = [triton, cpu, naive]
last_used = "none yet"

__all__ = ["BACKENDS", "Tiles", "block_linear", "tiles_of"]


def block_linear(
    x: Tensor, values: Tensor, tiles: Tiles, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """`F.linear` with a weight of active tiles.

    Args:
        x: [..., in_]; floating. Under autocast it is cast to the autocast dtype.
        values: [N, b, b] active tiles in row-major order of the grid, on the device of `x`; cast to its dtype where
            they differ.
        tiles: where they are (`tiles_of`), on the device of `x`.
        bias: [out] or None.
        backend: "naive", "cpu" or "triton"; None takes the first that can run, "triton" for CUDA tensors only.

    Returns:
        [..., out], dtype of `x` (of autocast under autocast). Gradients reach x, values and bias.

    Raises:
        ConfigError: `x`, `values` or `bias` does not have the size that `tiles` asks for.
        BackendError: the backend asked for is unknown or cannot run here.
    """
    global last_used
    if x.shape[-1] != tiles.in_ or tuple(values.shape) != tiles.shape:
        raise ConfigError(
            f"block_linear: tiles need x [..., {tiles.in_}] and values {list(tiles.shape)}, not {list(x.shape)} and"
            f" {list(values.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (tiles.out,):
        raise ConfigError(f"block_linear: bias is {list(bias.shape)}; the layer has {tiles.out} outputs")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    values, bias = values.to(x.dtype), None if bias is None else bias.to(x.dtype)
    module = _choose(x, tiles, backend)
    last_used = module.name
    if module is naive:
        return naive.block_linear(x, values, tiles, bias)
    return op.run(x, values, tiles, bias, module.name)


def _choose(x: Tensor, tiles: Tiles, backend: str | None):
    if backend is None:
        order = BACKENDS if x.is_cuda else (cpu, naive)
        return next(b for b in order if b.available()[0] and b.usable(x, tiles)[0])
    named = {b.name: b for b in BACKENDS}
    if backend not in named:
        raise BackendError(f"block_linear has no backend {backend!r}; it has {', '.join(named)}")
    for ok, reason in (named[backend].available(), named[backend].usable(x, tiles)):
        if not ok:
            raise BackendError(f"block_linear: backend {backend!r} cannot run: {reason}; use backend='naive'")
    return named[backend]
