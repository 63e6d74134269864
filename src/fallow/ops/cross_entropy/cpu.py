"""Cross entropy through native/cross_entropy.cpp: a row at a time in cache, fp32 in registers, rows of ignored labels
skipped.

Traffic: logits read once forwards; logits read and gradient written once backwards. The gradient goes to ONE fresh
buffer of the logits' size and dtype, not into the logits: those are the caller's `outputs.logits`, and they must
survive `backward()`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops import native, reuse

name = "native"

_DTYPES = (torch.float32, torch.bfloat16)


def available() -> tuple[bool, str]:
    """Whether the compiled kernels are there, and why not."""
    return native.available()


def usable(logits_NV: Tensor) -> tuple[bool, str]:
    """Whether these logits can be served here, and why not."""
    if logits_NV.device.type != "cpu":
        return False, f"logits on {logits_NV.device}"
    if logits_NV.dtype not in _DTYPES:
        return False, f"logits of {logits_NV.dtype}; served are bfloat16 and float32"
    if logits_NV.shape[1] and logits_NV.stride(1) != 1:
        return False, "the rows of the logits are not contiguous"
    return True, ""


def forward(logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and loss of each row, fp32 [N]; both 0 where the label is `ignore_index`."""
    n, width = logits_NV.shape
    lse_N, loss_N = torch.empty(n), torch.empty(n)
    native.library().fallow_cross_entropy_forward(
        logits_NV.data_ptr(),
        logits_NV.dtype == torch.bfloat16,
        n,
        width,
        logits_NV.stride(0),
        labels_N.data_ptr(),
        ignore_index,
        lse_N.data_ptr(),
        loss_N.data_ptr(),
        torch.get_num_threads(),
    )
    return lse_N, loss_N


def backward(logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, scale: Tensor, ignore_index: int) -> Tensor:
    """`scale` × (softmax − onehot) in the logits' dtype, [N, V]; rows of ignored labels are zero."""
    grad_NV = reuse.empty_like(logits_NV, "cross_entropy")
    n, width = logits_NV.shape
    native.library().fallow_cross_entropy_backward(
        logits_NV.data_ptr(),
        logits_NV.dtype == torch.bfloat16,
        n,
        width,
        logits_NV.stride(0),
        labels_N.data_ptr(),
        ignore_index,
        lse_N.data_ptr(),
        float(scale),
        grad_NV.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_NV
