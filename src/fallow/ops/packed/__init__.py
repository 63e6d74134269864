"""Packed sparse weights: `expand`, `compress`, and `packed_linear`, a linear layer whose weight exists dense only while
it is computed.

A weight [O, I] with n active entries is stored as `Layout` (one bit per weight) and `values` (n entries, row-major).
Forward and backward expand it into a scratch buffer that every layer shares, use dense GEMMs, and keep of the weight
gradient the active entries only. So time is dense's plus two expansions and a compression (bound by memory, a few per
cent of a GEMM at 2,048 tokens), and what lasts between calls is sparse. Source: ours; SMET (arXiv 2606.00888) stores
indices.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fallow.errors import BackendError
from fallow.ops import native
from fallow.ops.packed import cpu, naive, triton
from fallow.ops.packed.layout import Layout, layout_from_bitmap, layout_of

BACKENDS = [triton, cpu, naive]
last_used = "none yet"

__all__ = [
    "BACKENDS",
    "Layout",
    "compress",
    "expand",
    "layout_from_bitmap",
    "layout_of",
    "packed_linear",
    "scratch",
    "scratch_bytes",
]


def _choose(x: Tensor, backend: str | None):
    global last_used
    if backend is None:
        order = BACKENDS if x.is_cuda else (cpu, naive)
        module = next(b for b in order if b.available()[0] and b.usable(x)[0])
    else:
        named = {b.name: b for b in BACKENDS}
        if backend not in named:
            raise BackendError(f"packed has no backend {backend!r}; it has {', '.join(named)}")
        module = named[backend]
        for ok, why in (module.available(), module.usable(x)):
            if not ok:
                raise BackendError(f"packed: backend {backend!r} cannot run: {why}; use backend='naive'")
    last_used = module.name
    return module


def expand(values: Tensor, layout: Layout, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The dense matrix of packed values.

    Args:
        values: [n_active] in any shape, row-major; 1, 2 or 4 bytes an entry for the compiled kernels.
        layout: where they are.
        out: [O, I], contiguous, same dtype; every entry is written. None allocates.

    Returns:
        [O, I], zeros where inactive.
    """
    out = torch.empty(layout.shape, dtype=values.dtype, device=values.device) if out is None else out
    _choose(values, backend).expand(values, layout.bitmap_OB, layout.start_O1, out)
    return out


def compress(dense_OI: Tensor, layout: Layout, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The active entries of a dense matrix, [n_active], row-major. `out`: where to put them (any shape, contiguous)."""
    out = torch.empty(layout.n_active, dtype=dense_OI.dtype, device=dense_OI.device) if out is None else out
    _choose(dense_OI, backend).compress(dense_OI, layout.bitmap_OB, layout.start_O1, out)
    return out


class _Scratch(threading.local):
    """One buffer of bytes per thread on the CPU, as large as the largest layer met."""

    def __init__(self) -> None:
        self.buffers: dict[object, Tensor] = {}


_scratch = _Scratch()
_scratch_of_streams: dict[object, Tensor] = {}
"""On a GPU one buffer per stream, whichever thread launches: backward has a thread of its own there."""


def _buffers(device: torch.device) -> tuple[dict[object, Tensor], object]:
    if device.type != "cuda":
        return _scratch.buffers, device
    return _scratch_of_streams, (device, torch.cuda.current_stream(device).cuda_stream)


def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix whose content is lost at the next call for the same device."""
    needed = shape[0] * shape[1] * dtype.itemsize
    buffers, key = _buffers(device)
    held = buffers.get(key)
    if held is None or held.numel() < needed:
        buffers.pop(key, None)
        held = None  # freed before the larger one is allocated
        buffers[key] = held = torch.empty(needed, dtype=torch.uint8, device=device)
    return held[:needed].view(dtype).view(shape)


def scratch_bytes() -> int:
    """Bytes held by this thread's scratch buffers, and by those of GPU streams."""
    return sum(b.nbytes for b in (*_scratch.buffers.values(), *_scratch_of_streams.values()))


def packed_linear(
    x: Tensor, values: Tensor, bitmap_OB: Tensor, start_O1: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """`x Wᵀ + b` for a packed weight W.

    Args:
        x: [..., I], floating. Under autocast it is cast to the autocast dtype.
        values: [n_active] in any shape, row-major; cast to the dtype of x where they differ.
        bitmap_OB, start_O1: of the weight's `Layout`; taken apart so that a compiled graph sees tensors that a new
            topology overwrites in place.
        bias_O: [O].

    Returns:
        [..., O], dtype of x (of autocast under autocast). Gradients flow to x, the values and the bias.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _linear(x, values.to(x.dtype), bitmap_OB, start_O1, None if bias_O is None else bias_O.to(x.dtype))


@torch.library.custom_op("fallow::packed_linear", mutates_args=())
def _linear(x: Tensor, values: Tensor, bitmap_OB: Tensor, start_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    weight_OI = scratch((bitmap_OB.shape[0], x.shape[-1]), x.dtype, x.device)
    _choose(x, None).expand(values, bitmap_OB, start_O1, weight_OI)
    return torch.nn.functional.linear(x, weight_OI, bias_O)


@_linear.register_fake
def _(x: Tensor, values: Tensor, bitmap_OB: Tensor, start_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], bitmap_OB.shape[0])


@torch.library.custom_op("fallow::packed_linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor, x: Tensor, values: Tensor, bitmap_OB: Tensor, start_O1: Tensor
) -> tuple[Tensor, Tensor]:
    backend = _choose(x, None)
    n_out, n_in = bitmap_OB.shape[0], x.shape[-1]
    dy_TO, x_TI = dy.reshape(-1, n_out), x.reshape(-1, n_in)
    buffer_OI = scratch((n_out, n_in), x.dtype, x.device)
    backend.expand(values, bitmap_OB, start_O1, buffer_OI)
    dx = (dy_TO @ buffer_OI).view(x.shape)
    _weight_gradient(dy_TO, x_TI, buffer_OI)  # the weight is not needed any more: its gradient takes its place
    dvalues = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    backend.compress(buffer_OI, bitmap_OB, start_O1, dvalues)
    return dx, dvalues


_COPIED = 64 << 20
"""Bytes of dy that `_weight_gradient` copies at most."""


def _weight_gradient(dy_TO: Tensor, x_TI: Tensor, out_OI: Tensor) -> None:
    """dyᵀ x. oneDNN on AMX takes 1.2 to 2 times as long where dy is transposed by strides, so it is copied first.
    (Copied by chunks of rows it is no faster: each product packs x anew.)"""
    dy_OT = dy_TO.t()
    if dy_TO.nbytes <= _COPIED and dy_TO.dtype == torch.bfloat16 and dy_TO.device.type == "cpu" and native.has_amx():
        dy_OT = dy_OT.contiguous()
    torch.mm(dy_OT, x_TI, out=out_OI)


@_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, values: Tensor, bitmap_OB: Tensor, start_O1: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), values.new_empty(values.shape)


def _save(ctx, inputs, output) -> None:
    *saved, bias_O = inputs
    ctx.has_bias = bias_O is not None
    ctx.save_for_backward(*saved)


def _backward(ctx, dy: Tensor):
    dx, dvalues = _linear_backward(dy, *ctx.saved_tensors)
    bias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.has_bias else None
    return dx, dvalues, None, None, bias


_linear.register_autograd(_backward, setup_context=_save)
