"""The router: which experts a token needs, from the FFN's input by one small matrix [E, D].

Two starts, both without training. "centroid" points each expert's row at the mean of its neurons' input weights. What
decides is not how aligned they are but how much of the output an expert makes, so "fitted" regresses that on a batch:
least squares with a ridge, one solve [D, D]. `mass` is the truth both are measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centroid_router(rows_FD: Tensor, experts: int) -> Tensor:
    """fp32 [E, D]: means of the normalised input weights of each expert, all rescaled to one norm, the mean of theirs.

    Args:
        rows_FD: gate rows (up rows where there is no gate), expert after expert.
    """
    unit_FD = torch.nn.functional.normalize(rows_FD.float(), dim=1)
    mean_ED = unit_FD.view(experts, -1, rows_FD.shape[1]).mean(1)
    norm_E = mean_ED.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return mean_ED / norm_E * norm_E.mean()


def fitted_router(x_TD: Tensor, mass_TE: Tensor, *, ridge: float = 1e-2) -> Tensor:
    """fp32 [E, D] whose products with x order the experts as their masses do, in least squares.

    Args:
        x_TD: inputs of the FFN on a batch.
        mass_TE: what each expert contributed there (`mass`).
        ridge: weight of the penalty, as a share of the mean square of x.
    """
    x_TD = x_TD.double()
    # a softmax and a top-k see only differences between the experts of a token
    target_TE = mass_TE.double().sqrt()
    target_TE = target_TE - target_TE.mean(1, keepdim=True)
    target_TE = target_TE / target_TE.std().clamp_min(1e-12)
    gram_DD = x_TD.t() @ x_TD
    D = x_TD.shape[1]
    gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean().clamp_min(1e-12) + 1e-12)
    return torch.linalg.solve(gram_DD, x_TD.t() @ target_TE).t().float().contiguous().view(-1, D)


def route(x_TD: Tensor, router_ED: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """(int64 [T, k] the experts of each token, fp32 [T, k] softmax over them); gradients flow to x and the router. The
    softmax of a single one would be constant, so for k = 1 it is taken over all experts (ours)."""
    with torch.autocast(x_TD.device.type, enabled=False):  # a choice must not hang on 8 bits
        logits_TE = x_TD.float() @ router_ED.t()
        top = logits_TE.topk(active, dim=1)
        if active == 1:
            return top.indices, logits_TE.softmax(1).gather(1, top.indices)
        return top.indices, top.values.softmax(1)


def mass(hidden_TF: Tensor, down_norm_F: Tensor, experts: int) -> Tensor:
    """fp32 [T, E]: what each expert writes, as the sum of |h| times the norm of the neuron's output weights."""
    return (hidden_TF.float().abs() * down_norm_F).view(hidden_TF.shape[0], experts, -1).sum(2)


def recall(choice_Tk: Tensor, mass_TE: Tensor) -> tuple[float, float]:
    """(share of all mass that the chosen experts hold, the same for the best k of each token)."""
    total = float(mass_TE.sum().clamp_min(1e-30))
    chosen = float(mass_TE.gather(1, choice_Tk).sum())
    best = float(mass_TE.topk(choice_Tk.shape[1], dim=1).values.sum())
    return chosen / total, best / total
