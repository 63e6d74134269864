"""AdamW in plain PyTorch: the truth for every other backend, and what runs without the compiled kernels.

Loshchilov & Hutter 2019, in the operations and order of `torch.optim.AdamW`, so that fp32 results are bit-equal to it.
bf16 parameters are a rounded copy of an fp32 master. Cost: about ten passes over memory per tensor, where the native
kernel makes one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

name = "naive"


@dataclass(kw_only=True, slots=True)
class Hyper:
    """What all tensors of a parameter group share."""

    lr: float
    """Learning rate."""
    betas: tuple[float, float]
    """Decay rates of the first and second moment."""
    eps: float
    """Added to the root of the second moment."""
    weight_decay: float
    """Decoupled decay: the weight is multiplied by 1 - lr × weight_decay."""
    grad_scale: float = 1.0
    """The gradient is multiplied by this first (clipping without a pass of its own)."""


@dataclass(kw_only=True, slots=True)
class Tensors:
    """One parameter with its optimizer state; all of one shape, updated in place."""

    param: Tensor
    """bf16 or fp32 weights."""
    master: Tensor | None
    """fp32 master of a bf16 `param`; None when `param` is fp32."""
    exp_avg: Tensor
    """fp32 first moment."""
    exp_avg_sq: Tensor
    """fp32 second moment."""
    grad: Tensor
    """bf16 or fp32 gradient, never written."""

    @property
    def weight(self) -> Tensor:
        """The fp32 weights that are updated: the master, or an fp32 parameter itself."""
        return self.param if self.master is None else self.master


def available() -> tuple[bool, str]:
    """Always usable: plain PyTorch on any device."""
    return True, "plain PyTorch"


def usable(tensors: Tensors) -> tuple[bool, str]:
    """Whether these tensors can be updated here, and why not."""
    ok = tensors.weight.dtype == torch.float32
    return ok, "" if ok else f"weights of {tensors.weight.dtype} need an fp32 master"


def _scaled_grad(grad: Tensor, hyper: Hyper) -> Tensor:
    grad = grad.float()
    return grad if hyper.grad_scale == 1.0 else grad * hyper.grad_scale


def _moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper) -> None:
    beta1, beta2 = hyper.betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


@torch.no_grad()
def dense(tensors: list[Tensors], steps: list[int], hyper: Hyper) -> None:
    """Update whole tensors; `steps[i]` is the 1-based count of tensor i's update, this one included."""
    beta1, beta2 = hyper.betas
    for t, step in zip(tensors, steps, strict=True):
        weight = t.weight
        if hyper.weight_decay != 0:
            weight.mul_(1 - hyper.lr * hyper.weight_decay)
        _moments(_scaled_grad(t.grad, hyper), t.exp_avg, t.exp_avg_sq, hyper)
        denominator = (t.exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(hyper.eps)
        weight.addcdiv_(t.exp_avg, denominator, value=-(hyper.lr / (1 - beta1**step)))
        if t.master is not None:
            t.param.copy_(weight)


@torch.no_grad()
def subset(t: Tensors, dim: int, index: Tensor, clock: Tensor, hyper: Hyper) -> None:
    """Update only the rows (`dim` 0) or columns (1) `index` of a tensor; the rest keeps weight, moments and clock.

    Args:
        t: tensors of shape [R, C] (or any shape with `dim` 0).
        dim: 0 or 1.
        index: int64 [K], distinct.
        clock: int32 [size of `dim`], each row's or column's own step count, advanced in place; it sets the bias
            correction.
        hyper: shared settings.
    """
    beta1, beta2 = hyper.betas
    clock[index] += 1
    step = clock[index].double().reshape([-1 if d == dim else 1 for d in range(t.param.ndim)])
    step_size = (hyper.lr / (1 - beta1**step)).float()
    bias2_sqrt = (1 - beta2**step).sqrt().float()
    weight, exp_avg, exp_avg_sq = (x.index_select(dim, index) for x in (t.weight, t.exp_avg, t.exp_avg_sq))
    weight.mul_(1 - hyper.lr * hyper.weight_decay)
    _moments(_scaled_grad(t.grad.index_select(dim, index), hyper), exp_avg, exp_avg_sq, hyper)
    weight -= step_size * exp_avg / (exp_avg_sq.sqrt() / bias2_sqrt).add_(hyper.eps)
    t.exp_avg.index_copy_(dim, index, exp_avg)
    t.exp_avg_sq.index_copy_(dim, index, exp_avg_sq)
    t.weight.index_copy_(dim, index, weight)
    if t.master is not None:
        t.param.index_copy_(dim, index, weight.to(t.param.dtype))
