"""Cross entropy in plain PyTorch, a chunk of rows at a time: the truth for the native kernel, and what runs without it
or on a GPU.

The obvious alternative, `F.cross_entropy(logits.float())`, makes an fp32 copy of all logits, a second one of their
softmax and a third of the gradient (1.2 GB at 2048 tokens × 49k words). Here fp32 lives in chunks of a few rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

name = "naive"

_CHUNK_NUMEL = 1 << 22
"""Elements of a chunk: 16 MB in fp32."""


def available() -> tuple[bool, str]:
    """Always usable: plain PyTorch on any device."""
    return True, "plain PyTorch"


def usable(logits_NV: Tensor) -> tuple[bool, str]:
    """Whether these logits can be served here, and why not."""
    ok = logits_NV.is_floating_point()
    return ok, "" if ok else f"logits of {logits_NV.dtype}"


def _chunk_rows(logits_NV: Tensor) -> int:
    return max(1, _CHUNK_NUMEL // max(logits_NV.shape[1], 1))


def forward(logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and loss of each row, fp32 [N]; both 0 where the label is `ignore_index`."""
    lse_N = torch.zeros(logits_NV.shape[0], dtype=torch.float32, device=logits_NV.device)
    loss_N = torch.zeros_like(lse_N)
    rows = (labels_N != ignore_index).nonzero().squeeze(1)
    for kept in rows.split(_chunk_rows(logits_NV)):
        chunk = logits_NV[kept].float()
        lse = chunk.logsumexp(-1)
        lse_N[kept] = lse
        loss_N[kept] = lse - chunk.gather(1, labels_N[kept, None]).squeeze(1)
    return lse_N, loss_N


def backward(logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, scale: Tensor, ignore_index: int) -> Tensor:
    """`scale` × (softmax − onehot) in the logits' dtype, [N, V]; rows of ignored labels are zero."""
    grad_NV = torch.zeros_like(logits_NV, memory_format=torch.contiguous_format)
    rows = (labels_N != ignore_index).nonzero().squeeze(1)
    for kept in rows.split(_chunk_rows(logits_NV)):
        chunk = (logits_NV[kept].float() - lse_N[kept, None]).exp_()
        chunk.scatter_add_(1, labels_N[kept, None], chunk.new_full((len(kept), 1), -1.0))
        grad_NV[kept] = (chunk * scale.float()).to(grad_NV.dtype)
    return grad_NV
