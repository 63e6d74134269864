"""`row_attention`: attention of one new token per sequence over a cache of which a mask says what is filled.

    y[h] = softmax(scale · q[h] kᵀ over the open places) v        H query heads, consecutive H / G to one of G key heads

The cost follows the places that are open, not the room there is. The obvious alternative, torch's attention over a
static cache, reads all of it at every token, and inside `torch.compile` transformers first repeats keys and values for
every query head. Ours; inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.errors import BackendError, ConfigError
from fallow.ops.row_attention import cpu, naive

BACKENDS = [cpu, naive]
last_used = "none"

__all__ = ["BACKENDS", "last_used", "row_attention"]


def row_attention(
    q_BHd: Tensor,
    k_BGLd: Tensor,
    v_BGLd: Tensor,
    mask_BL: Tensor | None,
    scale: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention of one query per sequence and head.

    Args:
        q_BHd: [B, H, d], floating.
        k_BGLd, v_BGLd: [B, G, L, d], dtype of q; G divides H.
        mask_BL: bool [B or 1, L], True where a place may be seen, at least one in each row; None: all of them.
        scale: multiplies the scores.
        backend: "cpu" or "naive"; None takes the first that can run.

    Returns:
        [B, H, d], dtype of q; softmax and sums in fp32. No gradients.

    Raises:
        ConfigError: the heads of q are no multiple of those of k.
        BackendError: the backend asked for is unknown or cannot run here.
    """
    global last_used
    if q_BHd.shape[1] % k_BGLd.shape[1]:
        raise ConfigError(f"row_attention: {q_BHd.shape[1]} query heads on {k_BGLd.shape[1]} key heads do not share")
    module = _choose(q_BHd, k_BGLd, v_BGLd, mask_BL, backend)
    last_used = module.name
    return module.row_attention(q_BHd, k_BGLd, v_BGLd, mask_BL, scale)


def _choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str | None):
    if backend is None:
        return next(b for b in BACKENDS if b.available()[0] and b.usable(q, k, v, mask)[0])
    named = {b.name: b for b in BACKENDS}
    if backend not in named:
        raise BackendError(f"row_attention has no backend {backend!r}; it has {', '.join(named)}")
    for ok, reason in (named[backend].available(), named[backend].usable(q, k, v, mask)):
        if not ok:
            raise BackendError(f"row_attention: backend {backend!r} cannot run: {reason}; use backend='naive'")
    return named[backend]


_library = torch.library.Library("fallow", "FRAGMENT")
_library.define("row_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")


def _registered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What graphs call, whose shapes have been checked."""
    global last_used
    if cpu.available()[0] and cpu.serves(q, k, v, mask):
        last_used = cpu.name
        return cpu.row_attention(q, k, v, mask, scale)
    return row_attention(q, k, v, mask, scale)


_library.impl("row_attention", _registered, "CompositeExplicitAutograd")


@torch.library.register_fake("fallow::row_attention", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
