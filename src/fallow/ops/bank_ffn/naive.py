"""The truth for `bank_ffn`: scores, an exact mask by stable sort, and dense GEMMs around it, on every device.

Every weight is read, whatever the mask. Scores are fp32 (fp64 for fp64 inputs), from factors and codes turned back
into numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fallow.ops.activation import activation
from fallow.ops.bank_ffn.pack import round_x, unpack_quantized
from fallow.ops.bank_ffn.select import LOGITS, Int8Rows, Predictor, Weight

name = "naive"


def available() -> tuple[bool, str]:
    return True, "plain PyTorch"


def usable(x_TD: Tensor, predictor: Predictor, w_up_FD: Weight, bank: int) -> tuple[bool, str]:
    return True, "works on every device and dtype"


def mask_usable(scores_TF: Tensor, bank: int) -> tuple[bool, str]:
    return True, "works on every device and dtype"


def bank_mask(scores_TF: Tensor, *, bank: int, keep: int) -> Tensor:
    """As `fallow.ops.bank_ffn.bank_mask`."""
    banked_TNb = scores_TF.unflatten(1, (-1, bank))
    banked_TNb = torch.where(banked_TNb.isnan(), -torch.inf, banked_TNb)
    best_TNK = banked_TNb.sort(dim=2, descending=True, stable=True).indices[..., :keep]
    return torch.zeros_like(banked_TNb, dtype=torch.bool).scatter_(2, best_TNK, True).flatten(1)


def scores(x_TD: Tensor, predictor: Predictor, act: str) -> Tensor:
    """As `fallow.ops.bank_ffn.scores`."""
    kind, tensors, tilt_F = predictor[:3]
    exact = torch.promote_types(x_TD.dtype, torch.float32)
    if kind == "scores":
        s_TF = tensors[0].to(exact)
    elif kind == "quantized":
        group = tensors[0].shape[-1] // 2
        x_TGg, scale_TG = round_x(x_TD, group)
        x_TD = (x_TGg * scale_TG[..., None]).flatten(1).to(exact)
        codes, scales = tensors
        gate_FD, up_FD = (w.to(exact) for w in unpack_quantized(codes, scales))
        s_TF = _magnitude(x_TD @ gate_FD.t(), x_TD @ up_FD.t(), act)
    else:
        factors = _floating(tensors, exact)
        thin = [x_TD.to(exact) @ v_RD.t() @ u_FR.t() for v_RD, u_FR in zip(factors[::2], factors[1::2], strict=True)]
        s_TF = thin[0] if kind == "linear" else _magnitude(thin[0], thin[1], act)
    if tilt_F is None:
        return s_TF
    s_TF = s_TF[:, : tilt_F.shape[0]]
    return s_TF + tilt_F if kind in LOGITS else s_TF * tilt_F


def _magnitude(gate_TF: Tensor, up_TF: Tensor, act: str) -> Tensor:
    return (activation(gate_TF, act) * up_TF).abs()


def _floating(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """The factors; int8 ones with the scales that follow them multiplied in."""
    if tensors[0].dtype != torch.int8:
        return [t.to(dtype) for t in tensors]
    return [c.to(dtype) * s.to(dtype)[:, None] for c, s in zip(tensors[::2], tensors[1::2], strict=True)]


def dense(w: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor of this dtype."""
    return w.dense(dtype) if isinstance(w, Int8Rows) else w.to(dtype)


def coefficient(scores_TF: Tensor, predictor: Predictor, mask_TF: Tensor) -> Tensor:
    """What each hidden activation is multiplied by: zero on dead channels."""
    return mask_TF * (2 * torch.sigmoid(scores_TF)) if predictor.gate == "smooth" else mask_TF


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
    w_gate_FD, w_up_FD, w_down_FD = (dense(w, x_TD.dtype) for w in (w_gate_FD, w_up_FD, w_down_FD))
    scores_TF = scores(x_TD, predictor, act)[:, : w_up_FD.shape[0]]
    live_TF = coefficient(scores_TF, predictor, bank_mask(scores_TF, bank=bank, keep=keep))
    h_TF = activation(F.linear(x_TD, w_gate_FD), act) * F.linear(x_TD, w_up_FD)
    return compensated((h_TF * live_TF.to(h_TF.dtype)) @ w_down_FD, x_TD, predictor)


def compensated(y_TD: Tensor, x_TD: Tensor, predictor: Predictor) -> Tensor:
    """y, and what stands in for dead channels if something does."""
    if predictor.compensation is None:
        return y_TD
    v_RD, u_DR, b_D = (t.to(x_TD.dtype) for t in predictor.compensation)
    return y_TD + F.linear(F.linear(x_TD, v_RD), u_DR, b_D)
