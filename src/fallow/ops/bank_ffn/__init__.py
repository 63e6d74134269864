"""`bank_ffn`: a gated FFN of which each token computes the channels that a predictor keeps in every bank.

    s = predictor(x);  live = the `keep` largest s of every `bank` consecutive channels
    y = (live ∘ gate(s) ∘ act(x W_gateᵀ) ∘ (x W_upᵀ)) W_downᵀ  (+ U V x + b, where there is a compensation)

For decoding, which reads weights and does little else: of W_gate, W_up and W_down only the rows of living channels are
read, so W_down must lie in memory channel by channel. Source: arXiv 2606.10722, whose code computed the dense gate and
up projections; the kernels are ours. The obvious alternative, gathering rows into a smaller FFN, writes and reads every
living weight once more. Inference only: training masks dense GEMMs, for which `bank_mask` is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.errors import BackendError, ConfigError
from fallow.ops.activation import ACTIVATIONS
from fallow.ops.bank_ffn import cpu, dense, naive, op, pack, triton
from fallow.ops.bank_ffn.costs import break_even, bytes_read, dense_bytes
from fallow.ops.bank_ffn.layout import channel_contiguous_, side_by_side, side_by_side_
from fallow.ops.bank_ffn.pack import int8_rows, pack_factors, pack_quantized, unpack_quantized
from fallow.ops.bank_ffn.select import Int8Rows, Predictor, Weight, check_bank, check_predictor, tensor_of

BACKENDS = [cpu, triton, dense, naive]
MOST_TOKENS = 8
"""Tokens up to which kernels read living rows only; with more, dense GEMMs and a mask."""
last_used = "none yet"

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "MOST_TOKENS",
    "Int8Rows",
    "Predictor",
    "bank_ffn",
    "bank_mask",
    "break_even",
    "bytes_read",
    "channel_contiguous_",
    "dense_bytes",
    "int8_rows",
    "pack_factors",
    "pack_quantized",
    "rounded",
    "scores",
    "side_by_side",
    "side_by_side_",
    "unpack_quantized",
]


def bank_mask(scores_TF: Tensor, *, bank: int, keep: int, backend: str | None = None) -> Tensor:
    """Which channels live.

    Args:
        scores_TF: [T, F], floating.
        bank: consecutive channels that compete; a divisor of F.
        keep: how many of each bank live, 1 to `bank`.
        backend: as in `bank_ffn`.

    Returns:
        bool [T, F], exactly `keep` true in every bank: the largest scores, of equal ones those of lower index. NaN
        counts as the smallest.

    Raises:
        ConfigError: `bank` or `keep` does not fit.
    """
    check_bank(scores_TF.shape[1], bank, keep)
    masking = [b for b in BACKENDS if hasattr(b, "bank_mask")]
    module = _choose(masking, backend, lambda b: b.mask_usable(scores_TF, bank))
    return module.bank_mask(scores_TF.detach(), bank=bank, keep=keep)


def rounded(w_FD: Tensor, *, bits: int = 4, group: int = 64) -> Tensor:
    """What a quantized predictor's copy of a matrix holds.

    Args:
        w_FD: [F, D], floating.
        bits: 2 or 4.
        group: inputs that share a scale; a multiple of 16.

    Returns:
        [F, D], dtype of w.
    """
    native = w_FD.device.type == "cpu" and w_FD.dtype in (torch.bfloat16, torch.float32) and cpu.available()[0]
    return (cpu if native else pack).rounded(w_FD, bits=bits, group=group)


def scores(x_TD: Tensor, predictor: Predictor, act: str) -> Tensor:
    """fp32 [T, F]: what `bank_ffn` ranks channels by, in plain PyTorch. (Of a quantized predictor without a tilt, F is
    rounded up to 16.)

    Args:
        x_TD: [T, D], floating.
        predictor: of any kind, packed or not.
        act: the FFN's activation; bilinear and quantized kinds apply it.
    """
    return naive.scores(x_TD, predictor, act)


def bank_ffn(
    x: Tensor,
    predictor: Predictor,
    w_gate_FD: Weight,
    w_up_FD: Weight,
    w_down_FD: Weight,
    *,
    act: str,
    bank: int,
    keep: int,
    backend: str | None = None,
) -> Tensor:
    """The FFN of the living channels. No autograd.

    Args:
        x: [..., D], T tokens in all; floating.
        predictor: see `Predictor`.
        w_gate_FD, w_up_FD: [F, D], in the dtype of x, or all three `Int8Rows`.
        w_down_FD: [F, D], the *transposed* down projection. Kernels need rows that lie together: pass
            `down_DF.t()` of a parameter laid out by `channel_contiguous_`, or for speed all three by `side_by_side_`.
        act: "relu", "relu2", "silu", "gelu" or "gelu_tanh".
        bank, keep: of every `bank` consecutive channels `keep` live; `bank` divides F.
        backend: "naive", "cpu", "dense" or "triton"; None takes the first that can run these arguments.

    Returns:
        [..., D], dtype of x.

    Raises:
        ConfigError: an unknown `act`, shapes or a bank that do not fit, a gradient would be needed.
        BackendError: the backend asked for is unknown or cannot run here.
    """
    weights = (w_gate_FD, w_up_FD, w_down_FD)
    _check(x, predictor, weights, act, bank, keep)
    if torch.compiler.is_compiling():
        return op.traced(x, predictor, weights, act, bank, keep, backend)
    return run(x, predictor, *weights, act=act, bank=bank, keep=keep, backend=backend)


def run(
    x: Tensor,
    predictor: Predictor,
    w_gate_FD: Weight,
    w_up_FD: Weight,
    w_down_FD: Weight,
    *,
    act: str,
    bank: int,
    keep: int,
    backend: str | None,
) -> Tensor:
    """`bank_ffn` of arguments already checked, at once."""
    global last_used
    x_TD = x.reshape(-1, x.shape[-1])
    module = _choose(BACKENDS, backend, lambda b: b.usable(x_TD, predictor, w_up_FD, bank))
    last_used = module.name
    y_TD = module.bank_ffn(x_TD, predictor, w_gate_FD, w_up_FD, w_down_FD, act=act, bank=bank, keep=keep)
    return y_TD.view(x.shape)


def _check(
    x: Tensor, predictor: Predictor, weights: tuple[Weight, Weight, Weight], act: str, bank: int, keep: int
) -> None:
    gate, up, down = (tensor_of(w) for w in weights)
    if act not in ACTIVATIONS:
        raise ConfigError(f"bank_ffn: act={act!r} is not one of {', '.join(ACTIVATIONS)}")
    if x.shape[-1] != up.shape[1] or not gate.shape == up.shape == down.shape:
        raise ConfigError(
            f"bank_ffn: shapes do not fit: x {list(x.shape)}, w_gate {list(gate.shape)}, w_up {list(up.shape)}, w_down"
            f" {list(down.shape)}; needed are [..., D] and three times [F, D] (pass the down projection transposed)"
        )
    if not gate.dtype == up.dtype == down.dtype or up.dtype not in (x.dtype, torch.int8):
        raise ConfigError(
            f"bank_ffn: x is {x.dtype}, the weights {gate.dtype}, {up.dtype} and {down.dtype}; they must have the dtype"
            " of x, or all be Int8Rows"
        )
    F, D = up.shape
    check_bank(F, bank, keep)
    check_predictor(predictor, x.numel() // D, D, F)
    given = (x, gate, up, down, *predictor.tensors, *(predictor.compensation or ()))
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise ConfigError("bank_ffn: it has no gradients; call it under torch.no_grad(), and train with a mask")


def _choose(backends, backend: str | None, usable):
    if backend is None:
        return next(b for b in backends if b.available()[0] and usable(b)[0])
    named = {b.name: b for b in backends}
    if backend not in named:
        raise BackendError(f"bank_ffn has no backend {backend!r}; it has {', '.join(named)}")
    for ok, reason in (named[backend].available(), usable(named[backend])):
        if not ok:
            raise BackendError(f"bank_ffn: backend {backend!r} cannot run: {reason}; use backend='naive'")
    return named[backend]
