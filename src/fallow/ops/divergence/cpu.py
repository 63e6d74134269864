"""Divergence through native/divergence.cpp: a row of each at a time in cache, fp32 in registers.

Traffic: both logits read once, the gradient written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops import native

name = "native"


def available() -> tuple[bool, str]:
    """Whether the compiled kernels are there, and why not."""
    return native.available()


def usable(student_NV: Tensor, teacher_NV: Tensor) -> tuple[bool, str]:
    """Whether these logits can be served here, and why not."""
    if student_NV.device.type != "cpu" or teacher_NV.device.type != "cpu":
        return False, f"logits on {student_NV.device} and {teacher_NV.device}"
    if student_NV.dtype != teacher_NV.dtype or student_NV.dtype not in (torch.float32, torch.bfloat16):
        return False, f"logits of {student_NV.dtype} and {teacher_NV.dtype}; served are two of bfloat16 or of float32"
    return True, ""


def divergence(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(fp32 scalar, its gradient to the student's logits)."""
    student_NV, teacher_NV = student_NV.contiguous(), teacher_NV.contiguous()
    gradient_NV, per_row_N = torch.empty_like(student_NV), torch.empty(student_NV.shape[0])
    native.library().fallow_divergence(
        student_NV.data_ptr(),
        teacher_NV.data_ptr(),
        student_NV.dtype == torch.bfloat16,
        *student_NV.shape,
        gradient_NV.data_ptr(),
        per_row_N.data_ptr(),
        torch.get_num_threads(),
    )
    return per_row_N.sum(), gradient_NV
