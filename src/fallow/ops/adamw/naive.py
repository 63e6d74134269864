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


@dataclass(kw_only=True, slots=True)
class Aged:
    """Entries with clocks of their own (SMET): tables over an age byte, and the seed of stochastic rounding."""

    age: Tensor
    """uint8, one per entry."""
    step_size: Tensor
    """fp32 [256] on the CPU: lr / (1 - beta1^t), ramp included, by age."""
    bias2_sqrt: Tensor
    """fp32 [256] on the CPU: sqrt(1 - beta2^t), by age."""
    salt: int = 0
    """32 bits, of this parameter and step; read when the moments are bf16."""
    offset: int = 0
    """Number of the first entry in the unsharded parameter."""


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


def random_bits(entry: Tensor, salt: int) -> Tensor:
    """int64 in [0, 2^32) per int64 entry number: MurmurHash3's finaliser, as in native/adamw.cpp."""
    low = 0xFFFF_FFFF

    def times(x: Tensor, factor: int) -> Tensor:  # 32 × 32 bits would leave int64; 16 × 32 do not
        return (((x >> 16) * factor & 0xFFFF) << 16) + (x & 0xFFFF) * factor & low

    x = (times(entry & low, 0x9E37_79B9) + salt) & low
    x = times(x ^ (x >> 16), 0x85EB_CA6B)
    x = times(x ^ (x >> 13), 0xC2B2_AE35)
    return x ^ (x >> 16)


def rounded_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """bf16 of fp32 `x`: `noise`, int64 in [0, 65536), is added below the last kept bit. Inf and NaN pass through."""
    bits = x.contiguous().view(torch.int32).long() & 0xFFFF_FFFF
    finite = (bits & 0x7F80_0000) != 0x7F80_0000
    kept = (bits + torch.where(finite, noise, 0)) & 0xFFFF_0000
    return kept.to(torch.uint32).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def aged(t: Tensors, aged: Aged, hyper: Hyper) -> None:
    """Update a whole tensor whose entries have clocks of their own.

    With bf16 moments, they and a bf16 parameter without master are rounded stochastically: 0.999 v rounds back to v in
    bf16 otherwise, and a second moment never falls.
    """
    shape, cohort = t.param.shape, aged.age.long()
    step_size = aged.step_size.to(t.param.device)[cohort].view(shape)
    bias2_sqrt = aged.bias2_sqrt.to(t.param.device)[cohort].view(shape)
    weight, exp_avg, exp_avg_sq = (x.float() for x in (t.weight, t.exp_avg, t.exp_avg_sq))
    decayed = weight * (1 - hyper.lr * hyper.weight_decay)
    exp_avg, exp_avg_sq = exp_avg.clone(), exp_avg_sq.clone()
    _moments(_scaled_grad(t.grad, hyper), exp_avg, exp_avg_sq, hyper)
    denominator = (exp_avg_sq.sqrt() / bias2_sqrt).add_(hyper.eps)
    updated = decayed - step_size * exp_avg / denominator
    if t.exp_avg.dtype == torch.float32:
        new = (exp_avg, exp_avg_sq, updated)
    else:
        entry = (torch.arange(t.param.numel(), device=t.param.device) + aged.offset).view(shape)
        noise = random_bits(entry, aged.salt)
        new = (
            rounded_stochastically(exp_avg, noise & 0xFFFF),
            rounded_stochastically(exp_avg_sq, noise >> 16),
            updated,
        )
        if t.param.dtype == torch.bfloat16:
            noise = random_bits(entry, ~aged.salt & 0xFFFF_FFFF) & 0xFFFF
            new = (*new[:2], rounded_stochastically(updated, noise))
    t.exp_avg.copy_(new[0])
    t.exp_avg_sq.copy_(new[1])
    t.weight.copy_(new[2])
    if t.master is not None:
        t.param.copy_(updated)
