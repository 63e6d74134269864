"""`bank_ffn` on CPUs for many tokens, which together want nearly every row: dense GEMMs with a mask between them.

Scores and mask come from the kernels that decode, so a channel lives here as it does there. With 8 tokens and a quarter
of each bank alive, 90 % of the rows are wanted by some token. Costs the dense FFN and the predictor: where this runs,
the dense FFN is faster.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fallow.ops.activation import activation
from fallow.ops.bank_ffn import cpu, naive
from fallow.ops.bank_ffn.select import Predictor, Weight

name = "dense"
available = cpu.available


def usable(x_TD: Tensor, predictor: Predictor, w_up_FD: Weight, bank: int) -> tuple[bool, str]:
    """Whether these arguments can be served here, and why not."""
    found = cpu.usable(x_TD[:1], predictor, w_up_FD, bank)
    return (True, "dense GEMMs and a mask") if found[0] else found


def bank_ffn(
    x_TD: Tensor,
    predictor: Predictor,
    w_gate_FD: Weight,
    w_up_FD: Weight,
    w_down_FD: Weight,
    *,
    act: str,
    bank: int,
    keep: int,
) -> Tensor:
    """Arguments as `fallow.ops.bank_ffn.bank_ffn`, x as [T, D]."""
    scores_TF = cpu.scores(x_TD, predictor, w_up_FD, act=act)
    live_TF = naive.coefficient(scores_TF, predictor, cpu.bank_mask(scores_TF, bank=bank, keep=keep))
    w_gate_FD, w_up_FD, w_down_FD = (naive.dense(w, x_TD.dtype) for w in (w_gate_FD, w_up_FD, w_down_FD))
    h_TF = activation(F.linear(x_TD, w_gate_FD), act).mul_(F.linear(x_TD, w_up_FD)).mul_(live_TF)
    return naive.compensated(h_TF @ w_down_FD, x_TD, predictor)
