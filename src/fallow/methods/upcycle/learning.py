"""How a predictor learns: through the language model's loss by a gate's gradient, and by a loss of its own.

A choice has no gradient; each gate gives it one. Straight-through multiplies nothing and lets the gradient that a
multiplier would have had through to every score, chosen or not, for which dense training has all that is needed. The
loss of its own is a cross entropy within each bank: the share of the bank's total that each channel contributes against
the softmax of the scores, so that what counts is the order among neighbours, as in the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated(scores_TF: Tensor, mask_TF: Tensor, *, form: str, bank: int) -> Tensor:
    """[T, F] multipliers, 0 on dead channels.

    Args:
        scores_TF: logits.
        mask_TF: bool, the living.
        form: "hard": 1, no gradient. "straight_through": 1, the gradient of sigmoid(s) for all. "smooth": 2·sigmoid(s)
            on survivors. "soft_topk": 1, the gradient of sigmoid(s - the score between the bank's last survivor and
            its first dead channel) for all.
    """
    if form == "smooth":
        return 2 * scores_TF.float().sigmoid() * mask_TF
    if form == "hard" or not scores_TF.requires_grad:
        return mask_TF
    if form == "straight_through":
        soft_TF = scores_TF.float().sigmoid()
    else:
        banked, alive = scores_TF.float().unflatten(1, (-1, bank)), mask_TF.unflatten(1, (-1, bank))
        last = banked.detach().masked_fill(~alive, torch.inf).amin(2, keepdim=True)
        first_dead = banked.detach().masked_fill(alive, -torch.inf).amax(2, keepdim=True)
        border = torch.where(first_dead.isfinite(), (last + first_dead) / 2, last)
        soft_TF = (banked - border).sigmoid().flatten(1)
    return mask_TF + (soft_TF - soft_TF.detach())


def in_bank_cross_entropy(scores_TF: Tensor, contribution_TF: Tensor, bank: int) -> Tensor:
    """fp32 scalar, nats per bank and token above the entropy of the contributions: 0 for a perfect predictor.

    Args:
        scores_TF: logits, with gradient.
        contribution_TF: fp32, not negative.
    """
    scores = scores_TF.float().unflatten(1, (-1, bank))
    share = contribution_TF.detach().unflatten(1, (-1, bank))
    share = share / share.sum(2, keepdim=True).clamp_min(1e-30)
    return (share * (share.clamp_min(1e-30).log() - scores.log_softmax(2))).sum(2).mean()
