"""What all ranks must agree on: the watched batch, what was decided, the routers, and which experts were used.

Routers lie outside of what FSDP2 and DDP wrap, so their gradients are averaged here. On one rank nothing is done.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether more than one rank trains."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agreed(x: Tensor) -> Tensor:
    """Rank 0's, on every rank."""
    if several():
        x = x.contiguous()
        dist.broadcast(x, 0)
    return x


def mean_over_ranks(gradient: Tensor) -> Tensor:
    """As a hook on a parameter: its gradient, averaged."""
    if several():
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        gradient = gradient / dist.get_world_size()
    return gradient


def any_rank(used_E: Tensor) -> Tensor:
    """bool [E]: true where it is on some rank."""
    if several():
        count = used_E.int()
        dist.all_reduce(count)
        return count > 0
    return used_E
