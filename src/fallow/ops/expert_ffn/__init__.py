"""`expert_ffn`: an FFN cut into experts of equally many channels, of which each token computes the K it was sent to.

    h_e = act(x W_gate[e]ᵀ + b_gate[e]) ∘ (x W_up[e]ᵀ + b_up[e])     (or act(x W_up[e]ᵀ + b_up[e]) without a gate)
    y   = Σ over the chosen e of h_e W_down[:, e]ᵀ, + b_down once

Expert e owns channels [e·C, (e+1)·C) of the dense weights, C = F/E, which are read where they lie; with K = E this is
the dense FFN. FLOPs are K/E of the dense FFN's, in both passes. Source: SSD (arXiv 2410.03440); the unweighted sum and
the coefficient that only carries a gradient are of its conversion code. The obvious alternative, per-expert modules
with weights of their own, would make dense and sparse training two models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.errors import BackendError, ConfigError
from fallow.ops.activation import ACTIVATIONS
from fallow.ops.expert_ffn import cpu, naive, op, triton

BACKENDS = [triton, cpu, naive]
last_used = "none yet"

__all__ = ["ACTIVATIONS", "BACKENDS", "expert_ffn"]


def expert_ffn(
    x: Tensor,
    choice_TK: Tensor,
    coefficient_TK: Tensor | None,
    w_gate_FD: Tensor | None,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    b_gate_F: Tensor | None = None,
    b_up_F: Tensor | None = None,
    b_down_D: Tensor | None = None,
    *,
    act: str,
    experts: int,
    backend: str | None = None,
) -> Tensor:
    """The sum of each token's chosen experts.

    Args:
        x: [..., D], T tokens in all; floating. Under autocast it is cast to the autocast dtype.
        choice_TK: int64 [T, K], K different experts per token, in [0, experts).
        coefficient_TK: fp32 [T, K] or None. Its value must be 1 everywhere and is not multiplied; its gradient is
            <dy_t, output of expert k for t>, by which a router learns.
        w_gate_FD: [F, D], or None for the two-matrix FFN.
        w_up_FD, w_down_DF: [F, D] and [D, F], any strides; on the device of x, cast to its dtype where they differ.
        b_gate_F, b_up_F, b_down_D: biases or None.
        act: "relu", "relu2", "silu", "gelu" or "gelu_tanh".
        experts: E, a divisor of F.
        backend: "naive", "cpu" or "triton"; None takes the first that can run, "triton" for CUDA tensors only.

    Returns:
        [..., D], dtype of x. Gradients reach x, coefficient, weights and biases; those of an expert that no token
        chose are zero.

    Raises:
        ConfigError: unknown `act`, E not dividing F, shapes that do not fit, an expert out of range (CPU).
        BackendError: the backend asked for is unknown or cannot run here.
    """
    global last_used
    _check(x, choice_TK, coefficient_TK, w_gate_FD, w_up_FD, w_down_DF, act, experts)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    w_gate_FD, b_gate_F, b_up_F, b_down_D = (
        None if w is None else w.to(x.dtype) for w in (w_gate_FD, b_gate_F, b_up_F, b_down_D)
    )
    weights = (w_gate_FD, w_up_FD.to(x.dtype), w_down_DF.to(x.dtype), b_gate_F, b_up_F, b_down_D)
    module = _choose(x, backend)
    last_used = module.name
    if module is naive:
        return naive.expert_ffn(x, choice_TK, coefficient_TK, *weights, act=act, experts=experts)
    return op.run(x, choice_TK, coefficient_TK, weights, act, experts, module.name)


def _check(
    x: Tensor,
    choice: Tensor,
    coefficient: Tensor | None,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    act: str,
    experts: int,
) -> None:
    F, D = w_up.shape
    if act not in ACTIVATIONS:
        raise ConfigError(f"expert_ffn: act={act!r} is not one of {', '.join(ACTIVATIONS)}")
    if experts < 1 or F % experts:
        raise ConfigError(f"expert_ffn: {experts} experts do not divide {F} channels; use a divisor of {F}")
    if x.shape[-1] != D or tuple(w_down.shape) != (D, F) or (w_gate is not None and w_gate.shape != w_up.shape):
        gate = "" if w_gate is None else f"w_gate {list(w_gate.shape)}, "
        raise ConfigError(
            f"expert_ffn: shapes do not fit: x {list(x.shape)}, {gate}w_up {list(w_up.shape)}, w_down"
            f" {list(w_down.shape)}; needed are [..., D], [F, D] and [D, F]"
        )
    T = x.numel() // D
    if choice.dim() != 2 or choice.shape[0] != T or not 1 <= choice.shape[1] <= experts:
        raise ConfigError(
            f"expert_ffn: choice is {list(choice.shape)}; {T} tokens and {experts} experts need [{T}, 1 to {experts}]"
        )
    if choice.dtype != torch.int64:
        raise ConfigError(f"expert_ffn: choice is {choice.dtype}; pass int64 expert numbers")
    if coefficient is not None and coefficient.shape != choice.shape:
        raise ConfigError(f"expert_ffn: coefficient is {list(coefficient.shape)}, choice {list(choice.shape)}")


def _choose(x: Tensor, backend: str | None):
    if backend is None:
        order = BACKENDS if x.is_cuda else (cpu, naive)
        return next(b for b in order if b.available()[0] and b.usable(x)[0])
    named = {b.name: b for b in BACKENDS}
    if backend not in named:
        raise BackendError(f"expert_ffn has no backend {backend!r}; it has {', '.join(named)}")
    for ok, reason in (named[backend].available(), named[backend].usable(x)):
        if not ok:
            raise BackendError(f"expert_ffn: backend {backend!r} cannot run: {reason}; use backend='naive'")
    return named[backend]
