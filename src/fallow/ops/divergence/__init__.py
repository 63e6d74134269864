"""Kullback-Leibler divergence of a student's next-token distribution from a teacher's, for large vocabularies.

    Σ over rows of Σ_v p_teacher(v) (log p_teacher(v) - log p_student(v)),  p = softmax of the logits

The obvious `F.kl_div` of two `log_softmax` keeps four fp32 copies of the logits; here the gradient is made in the same
pass as the value, and only it is kept, in the logits' own dtype. No gradient goes to the teacher.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fallow.errors import ConfigError
from fallow.ops.divergence import cpu, naive

BACKENDS = [cpu, naive]
last_used = "none"

__all__ = ["BACKENDS", "divergence", "last_used"]


def _backend(student_NV: Tensor, teacher_NV: Tensor) -> ModuleType:
    global last_used
    chosen = cpu if cpu.available()[0] and cpu.usable(student_NV, teacher_NV)[0] else naive
    last_used = chosen.name
    return chosen


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:  # type: ignore[override]
        total, gradient_NV = _backend(student_NV, teacher_NV).divergence(student_NV, teacher_NV)
        ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(scale.to(gradient_NV.dtype)), None


def divergence(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """fp32 scalar, nats, summed over rows.

    Args:
        student_NV: logits [N, V], any floating dtype; their gradient comes in it. Backward may be called once.
        teacher_NV: logits [N, V].

    Raises:
        ConfigError: the shapes differ.
    """
    if student_NV.ndim != 2 or student_NV.shape != teacher_NV.shape:
        raise ConfigError(
            f"logits of {tuple(student_NV.shape)} and {tuple(teacher_NV.shape)} cannot be compared; teacher and student"
            " need one vocabulary and the same tokens, as [N, V]"
        )
    return _Divergence.apply(student_NV, teacher_NV)  # type: ignore[return-value]
