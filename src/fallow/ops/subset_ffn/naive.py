"""The truth for `subset_ffn`: the whole FFN, with a 0/1 mask over its channels, in plain autograd.

It saves no work; every other backend must match its value and each of its gradients.
`omit_in="backward"` adds what the omitted channels contribute, detached; `omit_in="weight_grad"` is the dense FFN whose
omitted weights are detached.
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


def subset_ffn(
    x_TD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    idx_K: Tensor | None,
    *,
    w_gate_FD: Tensor | None = None,
    b_gate_F: Tensor | None = None,
    b_up_F: Tensor | None = None,
    b_down_D: Tensor | None = None,
    act: str = "silu",
    omit_in: str = "forward+backward",
) -> Tensor:
    if omit_in == "weight_grad" and idx_K is not None:
        return _dense_with_frozen_channels(x_TD, w_up_FD, w_down_DF, idx_K, w_gate_FD, b_gate_F, b_up_F, b_down_D, act)
    h_TF = _hidden(x_TD, w_up_FD, b_up_F, w_gate_FD, b_gate_F, act)
    if idx_K is None:
        return F.linear(h_TF, w_down_DF, b_down_D)
    idx_SK = idx_K if idx_K.dim() == 2 else idx_K[None]
    mask_SF = torch.zeros(idx_SK.shape[0], w_up_FD.shape[0], dtype=torch.bool, device=x_TD.device)
    mask_SF.scatter_(1, idx_SK, True)
    mask_TF = mask_SF.repeat_interleave(x_TD.shape[0] // idx_SK.shape[0], 0)
    y_TD = F.linear(torch.where(mask_TF, h_TF, 0), w_down_DF, b_down_D)
    if omit_in == "backward":
        y_TD = y_TD + F.linear(torch.where(mask_TF, 0, h_TF).detach(), w_down_DF.detach())
    return y_TD


def _dense_with_frozen_channels(
    x_TD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    idx_K: Tensor,
    w_gate_FD: Tensor | None,
    b_gate_F: Tensor | None,
    b_up_F: Tensor | None,
    b_down_D: Tensor | None,
    act: str,
) -> Tensor:
    def frozen(w: Tensor | None, kept_F: Tensor) -> Tensor | None:
        """`w` with channels along its first dim, detached but for the kept ones."""
        if w is None:
            return None
        return torch.where(kept_F if w.dim() == 1 else kept_F[:, None], w, w.detach())

    idx_SK = idx_K if idx_K.dim() == 2 else idx_K[None]
    parts = []
    for x, idx in zip(x_TD.chunk(idx_SK.shape[0]), idx_SK, strict=True):
        kept_F = torch.zeros(w_up_FD.shape[0], dtype=torch.bool, device=x.device).index_fill(0, idx, True)
        w_up, b_up, w_gate, b_gate = (frozen(w, kept_F) for w in (w_up_FD, b_up_F, w_gate_FD, b_gate_F))
        w_down = torch.where(kept_F, w_down_DF, w_down_DF.detach())
        assert w_up is not None
        h = _hidden(x, w_up, b_up, w_gate, b_gate, act)
        parts.append(F.linear(h, w_down, b_down_D))
    return torch.cat(parts)


def _hidden(
    x_TD: Tensor, w_up_FD: Tensor, b_up_F: Tensor | None, w_gate_FD: Tensor | None, b_gate_F: Tensor | None, act: str
) -> Tensor:
    """h [T, F]."""
    up_TF = F.linear(x_TD, w_up_FD, b_up_F)
    return activation(up_TF, act) if w_gate_FD is None else activation(F.linear(x_TD, w_gate_FD, b_gate_F), act) * up_TF
