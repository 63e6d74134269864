"""The truth for `expert_ffn`: a loop over experts in plain autograd, on every device and dtype.

Each expert takes its tokens out of x, runs an ordinary FFN on its slices of the weights and adds its rows into y, which
is summed in fp32 for 16-bit inputs. Slow: autograd writes a full-size gradient of each weight per expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fallow.ops.activation import activation

name = "naive"


def available() -> tuple[bool, str]:
    return True, "plain PyTorch"


def usable(x: Tensor) -> tuple[bool, str]:
    return True, "works on every device and dtype"


def expert_ffn(
    x: Tensor,
    choice_TK: Tensor,
    coefficient_TK: Tensor | None,
    w_gate_FD: Tensor | None,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    b_gate_F: Tensor | None,
    b_up_F: Tensor | None,
    b_down_D: Tensor | None,
    *,
    act: str,
    experts: int,
) -> Tensor:
    """Arguments as `fallow.ops.expert_ffn.expert_ffn`."""
    D, C = x.shape[-1], w_up_FD.shape[0] // experts
    x_TD = x.reshape(-1, D)
    y_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for e in range(experts):
        own = slice(e * C, (e + 1) * C)
        token_N, k_N = (choice_TK == e).nonzero(as_tuple=True)
        x_ND = x_TD[token_N]
        h_NC = F.linear(x_ND, w_up_FD[own], None if b_up_F is None else b_up_F[own])
        if w_gate_FD is None:
            h_NC = activation(h_NC, act)
        else:
            gate_NC = F.linear(x_ND, w_gate_FD[own], None if b_gate_F is None else b_gate_F[own])
            h_NC = activation(gate_NC, act) * h_NC
        y_ND = F.linear(h_NC, w_down_DF[:, own]).to(y_TD.dtype)
        if coefficient_TK is not None:
            y_ND = y_ND * coefficient_TK[token_N, k_N, None]
        y_TD = y_TD.index_add(0, token_N, y_ND)
    if b_down_D is not None:
        y_TD = y_TD + b_down_D
    return y_TD.to(x.dtype).view(x.shape)
