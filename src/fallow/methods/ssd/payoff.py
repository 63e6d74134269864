"""Does computing k of E experts pay at this model's widths, on this machine? Timed on one FFN before the first step.

The dense FFN, k experts and all experts are timed side by side, forward and backward, on as many tokens as a step has
(2,048 at most). The cost of experts is a start-up and a part in proportion to k, so two points give the share up to
which they are faster than dense. Cost: about ten steps of one FFN. `fallow bench ssd` measures it with more care.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fallow.methods.ssd.layers import ExpertFFN
from fallow.ops.activation import activation
from fallow.ops.expert_ffn import expert_ffn
from fallow.shards import whole

MOST_TOKENS = 2048
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Payoff:
    """Of one FFN."""

    ratio: float
    """Seconds of the dense FFN over seconds by k experts."""
    break_even: float | None
    """Share of active experts up to which experts are faster; None: at no share."""


def payoff(layer: ExpertFFN, tokens: int) -> Payoff:
    """Time one FFN now. Of sharded weights a collective."""
    w = layer.view.weights()
    stored = [None if x is None else whole(x).detach().requires_grad_() for x in (w.w_gate_FD, w.w_up_FD, w.w_down_DF)]
    gate_FD, up_FD, down_DF = stored
    assert up_FD is not None and down_DF is not None
    g = torch.Generator().manual_seed(0)
    T, E = min(tokens, MOST_TOKENS), layer.n_experts
    x_TD = torch.randn(T, layer.view.d_model, generator=g).to(up_FD).requires_grad_()
    choices = {k: torch.rand(T, E, generator=g).topk(k, dim=1).indices.to(up_FD.device) for k in (layer.active, E)}

    def dense() -> Tensor:
        up_TF = F.linear(x_TD, up_FD)
        h_TF = activation(up_TF if gate_FD is None else F.linear(x_TD, gate_FD), layer.view.act)
        return F.linear(h_TF if gate_FD is None else h_TF * up_TF, down_DF)

    def by(k: int) -> Tensor:
        return expert_ffn(x_TD, choices[k], None, gate_FD, up_FD, down_DF, act=layer.view.act, experts=E)

    leaves = [x_TD, *(x for x in stored if x is not None)]
    forms: dict[str, Callable[[], Tensor]] = {"dense": dense, "k": lambda: by(layer.active), "all": lambda: by(E)}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(1 + _ROUNDS):
        for name, form in forms.items():
            began = _now(x_TD)
            torch.autograd.grad(form().sum(), leaves)
            taken = _now(x_TD) - began
            if i:  # the first round warms up
                seconds[name].append(taken)
    cost = {name: statistics.median(s) / statistics.median(seconds["dense"]) for name, s in seconds.items()}
    share = layer.active / E
    slope = (cost["all"] - cost["k"]) / (1 - share) if share < 1 else 0.0
    start = cost["k"] - slope * share
    even = (1 - start) / slope if slope > 0 else None
    return Payoff(ratio=1 / cost["k"], break_even=None if even is None or even <= 0 else min(1.0, even))


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
