"""The truth in PyTorch, in chunks of rows so that no fp32 copy of all logits is made. Works on every device."""

from __future__ import annotations

import torch
from torch import Tensor

name = "naive"
ROWS, ROWS_OF_GPU = 128, 2048
"""Rows whose fp32 softmax is held at a time: few on a CPU, for its cache; on a GPU many, for its launches."""


def available() -> tuple[bool, str]:
    return True, "plain PyTorch"


def divergence(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(fp32 scalar, its gradient to the student's logits)."""
    total = student_NV.new_zeros((), dtype=torch.float32)
    gradient_NV = torch.empty_like(student_NV, memory_format=torch.contiguous_format)
    held = ROWS if student_NV.device.type == "cpu" else ROWS_OF_GPU
    for first in range(0, student_NV.shape[0], held):
        rows = slice(first, first + held)
        s, t = student_NV[rows].float().log_softmax(1), teacher_NV[rows].float().log_softmax(1)
        p = t.exp()
        total += (p * (t - s)).sum()
        gradient_NV[rows] = s.exp_().sub_(p)
    return total, gradient_NV
