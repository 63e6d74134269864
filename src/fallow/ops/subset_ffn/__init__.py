"""`subset_ffn`: an FFN of which only some channels are computed: in both passes, backward, or for weight gradients.

    h = act(x Wgᵀ + bg) ∘ (x Wuᵀ + bu)     (or act(x Wuᵀ + bu) without a gate)
    y = h[:, idx] Wd[:, idx]ᵀ + bd

FLOPs fall with the number of kept channels K/F; gradients of omitted rows and columns are exactly zero.
Source: SAT (arXiv 2406.01392) for `omit_in="forward+backward"`; "backward" and "weight_grad" are ours.
"""

from __future__ import annotations

from torch import Tensor

from fallow.errors import BackendError, ConfigError
from fallow.ops.activation import ACTIVATIONS
from fallow.ops.subset_ffn import cpu, naive, triton

BACKENDS = [triton, cpu, naive]
OMIT_IN = ("forward+backward", "backward", "weight_grad")
last_used = "none yet"


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
    backend: str | None = None,
) -> Tensor:
    """FFN over the kept channels.

    Args:
        x_TD: [T, D] tokens; floating, on the weights' device and in their dtype.
        w_up_FD, w_gate_FD: [F, D]; `w_gate_FD=None` is the two-matrix FFN.
        w_down_DF: [D, F].
        idx_K: int64 kept channels, sorted: [K] for all tokens, or [S, K] for S sequences of T/S tokens; None keeps all.
        act: "silu", "gelu", "gelu_tanh", "relu" or "relu2" (its square).
        omit_in: "forward+backward" computes the kept channels only; "backward" computes all channels forward, and
            lets gradient through the kept ones only, saving only their activations; "weight_grad" is the dense FFN,
            input gradient included, except that weights and biases of omitted channels get no gradient.
        backend: "naive", "cpu" or "triton"; None takes the first that can run.

    Returns:
        y_TD: [T, D], dtype of x.

    Raises:
        ConfigError: unknown `act` or `omit_in`. BackendError: the backend asked for cannot run here.
    """
    global last_used
    if act not in ACTIVATIONS:
        raise ConfigError(f"subset_ffn: act={act!r} is not one of {', '.join(ACTIVATIONS)}")
    if omit_in not in OMIT_IN:
        raise ConfigError(f"subset_ffn: omit_in={omit_in!r}; use one of {', '.join(map(repr, OMIT_IN))}")
    module = _choose(x_TD, idx_K, backend)
    last_used = module.name
    return module.subset_ffn(
        x_TD,
        w_up_FD,
        w_down_DF,
        idx_K,
        w_gate_FD=w_gate_FD,
        b_gate_F=b_gate_F,
        b_up_F=b_up_F,
        b_down_D=b_down_D,
        act=act,
        omit_in=omit_in,
    )


def _choose(x: Tensor, idx: Tensor | None, backend: str | None):
    if backend is not None:
        named = {b.name: b for b in BACKENDS}
        if backend not in named:
            raise BackendError(f"subset_ffn has no backend {backend!r}; it has {', '.join(named)}")
        for check in (named[backend].available(), named[backend].usable(x)):
            if not check[0]:
                raise BackendError(f"subset_ffn: backend {backend!r} cannot run: {check[1]}; use backend='naive'")
        return named[backend]
    per_sequence = idx is not None and idx.dim() == 2
    if x.is_cuda and not per_sequence and triton.available()[0] and triton.usable(x)[0]:
        return triton
    return cpu
