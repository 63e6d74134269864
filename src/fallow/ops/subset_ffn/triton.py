"""`subset_ffn` on GPUs, in two variants that save and compute the same things.

"gather" (default): kept rows of gate and up are copied into one [2K, D] operand, kept columns of down into [D, K], and
torch.mm does the arithmetic; the rest are one-pass kernels (triton_kernels.py). The copies cost 6·K·D elements read and
written per direction against 18·T·K·D FLOPs in all, a few percent at T = 8192; that cuBLAS makes up for it is expected,
not measured yet.
"fused": the GEMMs read the kept rows through the index themselves (triton_gemms.py). Only w_down's columns are copied:
reading them in the tile loader would repeat scattered 2-byte loads T/128 times, one copy reads D·F and writes D·K. A
transposed copy kept across steps was the alternative; each optimizer step would have to rewrite it, 2·D·F elements.

Saved for backward: x and the preactivations of kept channels, nothing else; h is recomputed. Weights are gathered again
in backward rather than kept. Tested without a GPU: values and gradients under Triton's interpreter (TRITON_INTERPRET=1)
in fp32, fp16 and, for "gather" only (the interpreter's dot has no bf16), bf16; and every kernel compiles for sm_90.
On a GPU "gather" passed the gate in fp32 and bf16 (benchmarks/gpu_gates.py says what ReLU needs); fp16 and "fused" have
not been through it, and neither is timed: benchmarks/gpu_all.py checks first, then times both.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fallow.errors import BackendError
from fallow.ops.gpu import available as available
from fallow.ops.gpu import runs_on

name = "triton"
Variant = Literal["gather", "fused"]
VARIANTS: tuple[Variant, ...] = ("gather", "fused")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def usable(x: Tensor, idx: Tensor | None = None) -> tuple[bool, str]:
    """Whether this backend computes these arguments, and why (not)."""
    if not (found := runs_on(x))[0]:
        return found
    if x.dtype not in DTYPES:
        return False, f"x is {x.dtype}; kernels know bfloat16, float16 and float32"
    if idx is not None and idx.dim() != 1:
        return False, "channels per sequence ([S, K]) would be S small GEMMs; give one [K] selection"
    return True, "kept channels gathered by Triton, GEMMs by cuBLAS"


@torch.library.custom_op("fallow::subset_ffn_triton", mutates_args=())
def _forward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    idx: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    act: str,
    omit_in: str,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """(y [T, D], pre): `pre` is [T, 2K] when gated (gate, then up), else [T, K]; K = F with omit_in="weight_grad"."""
    from fallow.ops.subset_ffn.triton_steps import forward

    with torch.cuda.device_of(x):
        return forward(x, w_up, w_down, idx, w_gate, (b_gate, b_up), b_down, act=act, omit_in=omit_in, fused=fused)


@_forward.register_fake
def _(x, w_up, w_down, idx, w_gate, b_gate, b_up, b_down, act, omit_in, fused):
    K = w_up.shape[0] if idx is None or omit_in == "weight_grad" else idx.shape[0]
    return x.new_empty(x.shape[0], w_down.shape[0]), x.new_empty(x.shape[0], K if w_gate is None else 2 * K)


@torch.library.custom_op("fallow::subset_ffn_triton_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    idx: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    act: str,
    omit_in: str,
    need: list[bool],
    fused: bool,
) -> list[Tensor]:
    """Gradients of [x, w_up, w_down, w_gate, b_gate, b_up, b_down]; empty where `need` is false."""
    from fallow.ops.subset_ffn.triton_steps import backward

    with torch.cuda.device_of(x):
        return backward(
            dy, x, pre, w_up, w_down, idx, w_gate, (b_gate, b_up), act=act, omit_in=omit_in, need=need, fused=fused
        )


@_backward.register_fake
def _(dy, x, pre, w_up, w_down, idx, w_gate, b_gate, b_up, act, omit_in, need, fused):
    F, D = w_up.shape
    weights = [w_up, w_down, w_gate]
    grads = [x.new_empty(x.shape), *(x.new_empty(0) if w is None else torch.empty_like(w) for w in weights)]
    grads += [x.new_empty(F), x.new_empty(F), x.new_empty(D)]
    return [grad if needed else x.new_empty(0) for grad, needed in zip(grads, need, strict=True)]


def _setup(ctx, inputs, output):
    x, w_up, w_down, idx, w_gate, b_gate, b_up, _, ctx.act, ctx.omit_in, ctx.fused = inputs
    ctx.save_for_backward(x, output[1], w_up, w_down, idx, w_gate, b_gate, b_up)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, _dpre):
    if dy is None:
        return (None,) * 11
    x, pre, w_up, w_down, idx, w_gate, b_gate, b_up = ctx.saved_tensors
    order = (0, 1, 2, 4, 5, 6, 7)  # places of the differentiable arguments
    need = [ctx.needs_input_grad[i] for i in order]
    found = _backward(
        dy.contiguous(), x, pre, w_up, w_down, idx, w_gate, b_gate, b_up, ctx.act, ctx.omit_in, need, ctx.fused
    )
    grads: list[Tensor | None] = [None] * 11
    for i, needed, grad in zip(order, need, found, strict=True):
        grads[i] = grad if needed else None
    return tuple(grads)


_forward.register_autograd(_autograd, setup_context=_setup)


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
    variant: Variant = "gather",
) -> Tensor:
    """y [T, D] of the FFN over the kept channels; arguments as `fallow.ops.subset_ffn.subset_ffn`, indices distinct.

    `variant` is "gather" or "fused" (see the head of this file). Under autocast, everything is cast to its dtype.
    Raises BackendError when `usable` says no.
    """
    ok, reason = usable(x_TD, idx_K)
    if not ok or variant not in VARIANTS:
        why = reason if not ok else f"variant={variant!r} is not one of {', '.join(VARIANTS)}"
        raise BackendError(f"subset_ffn: the triton backend cannot run: {why}; use backend='cpu' or 'naive'")
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD, w_up_FD, w_down_DF = x_TD.to(dtype), w_up_FD.to(dtype), w_down_DF.to(dtype)
        optional = (w_gate_FD, b_gate_F, b_up_F, b_down_D)
        w_gate_FD, b_gate_F, b_up_F, b_down_D = (None if t is None else t.to(dtype) for t in optional)
    if w_gate_FD is not None and w_gate_FD.stride() != w_up_FD.stride():
        w_gate_FD, w_up_FD = w_gate_FD.contiguous(), w_up_FD.contiguous()
    tensors = (x_TD.contiguous(), w_up_FD, w_down_DF, idx_K, w_gate_FD, b_gate_F, b_up_F, b_down_D)
    return _forward(*tensors, act, omit_in, variant == "fused")[0]
