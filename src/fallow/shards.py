"""Whole tensors from sharded ones and back, one layer at a time; plain tensors are served as they are.

A topology update moves entries between places of the packed vector, hence between ranks. Gathering a layer's whole
vector once in `update_every` steps is simpler than routing entries, and costs about what one step's all-gather does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(x: Tensor) -> Tensor:
    """This rank's part."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """The whole tensor, on every rank. Of a DTensor a collective: every rank must call it."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def first_entry(x: Tensor) -> int:
    """Number of this rank's first entry in the whole, row-major tensor (sharded along dim 0)."""
    if not isinstance(x, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return offset[0] * (x.shape[1:].numel() if x.dim() > 1 else 1)


def reshard(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows: FSDP2 leaves its root gathered then. Else nothing."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def put(target: Tensor, full: Tensor) -> None:
    """Write this rank's part of `full` into `target`, in place."""
    if not isinstance(target, DTensor):
        target.copy_(full.view(target.shape))
        return
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    part = full.view(target.shape)[offset[0] : offset[0] + shape[0]]
    target.to_local().copy_(part)
