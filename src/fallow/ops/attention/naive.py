"""Scaled dot-product attention with grouped queries, written out: fp32 scores and softmax. The truth for the other
backends.

Memory and traffic: three fp32 tensors of [B, H, T, T]; for tests and as the fallback, not for training runs.
Shapes: B batch, H query heads, G key/value heads (groups), R = H / G query heads of one group, T tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "naive"


def available() -> tuple[bool, str]:
    """Always usable: plain PyTorch on any device."""
    return True, "plain PyTorch"


def usable(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None, dropout: float) -> tuple[bool, str]:
    """Whether these tensors can be served here, and why not."""
    return True, ""


def allowed_of(mask: Tensor) -> Tensor:
    """bool, True where a key may be seen. Additive masks forbid with -inf or with the lowest number of their dtype."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def attention(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, [B, H, T, d]; zeros for a query without keys. Queries align to the last keys."""
    groups = q_BHTd.shape[1] // k_BGTd.shape[1]
    k_BHTd, v_BHTd = (x.repeat_interleave(groups, dim=1).float() for x in (k_BGTd, v_BGTd))
    scores = (q_BHTd.float() * scale) @ k_BHTd.transpose(-1, -2)
    n_queries, n_keys = scores.shape[-2:]
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device)
    if causal:
        allowed = allowed.tril(n_keys - n_queries)
    if mask is not None:
        allowed = allowed & allowed_of(mask)
        if mask.dtype != torch.bool:
            scores = scores + mask.float()
    scores = scores.masked_fill(~allowed, float("-inf"))
    # softmax of a row of -inf is NaN: such rows are given any finite score, and zeroed after
    p = torch.softmax(scores.masked_fill(~allowed.any(-1, keepdim=True), 0.0), dim=-1).masked_fill(~allowed, 0.0)
    return (torch.nn.functional.dropout(p, dropout) @ v_BHTd).to(q_BHTd.dtype)
