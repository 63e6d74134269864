"""AdamW through native/adamw.cpp: one pass over memory per tensor, on `torch.get_num_threads()` threads.

28 bytes are moved per bf16 weight (master, two moments and gradient read; master, moments and weight written); the
naive form moves about 150. One call updates all tensors of a group, so that the split over threads is even.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fallow.ops import native
from fallow.ops.adamw.naive import Aged, Hyper, Tensors

name = "native"

_DTYPES = (torch.float32, torch.bfloat16)


def available() -> tuple[bool, str]:
    """Whether the compiled kernels are there, and why not."""
    return native.available()


def usable(tensors: Tensors) -> tuple[bool, str]:
    """Whether these tensors can be updated here, and why not."""
    if tensors.param.device.type != "cpu":
        return False, f"parameters on {tensors.param.device}"
    if tensors.param.dtype not in _DTYPES or tensors.grad.dtype not in _DTYPES:
        return False, f"dtypes {tensors.param.dtype}, {tensors.grad.dtype}; served are bfloat16 and float32"
    if tensors.weight.dtype != torch.float32:
        return False, "a bfloat16 parameter needs an fp32 master"
    state = (tensors.weight, tensors.param, tensors.exp_avg, tensors.exp_avg_sq)
    if not all(x.is_contiguous() for x in state):
        return False, "parameter or state is not contiguous"
    return True, ""


def _address(x: Tensor) -> int:
    return x.data_ptr()


def _hyper(hyper: Hyper) -> native.AdamWHyper:
    beta1, beta2 = hyper.betas
    return native.AdamWHyper(hyper.lr, beta1, beta2, hyper.eps, hyper.weight_decay, hyper.grad_scale)


def _describe(t: Tensors, grad: Tensor, step_size: float = 0.0, bias2_sqrt: float = 1.0) -> native.AdamWTensor:
    return native.AdamWTensor(
        _address(t.param),
        0 if t.master is None else _address(t.master),
        _address(t.exp_avg),
        _address(t.exp_avg_sq),
        _address(grad),
        t.param.numel(),
        step_size,
        bias2_sqrt,
        t.param.dtype == torch.bfloat16,
        grad.dtype == torch.bfloat16,
    )


def dense(tensors: list[Tensors], steps: list[int], hyper: Hyper) -> None:
    """Update whole tensors; `steps[i]` is the 1-based count of tensor i's update, this one included."""
    beta1, beta2 = hyper.betas
    grads = [t.grad.contiguous() for t in tensors]
    described = (native.AdamWTensor * len(tensors))(
        *(
            _describe(t, grad, hyper.lr / (1 - beta1**step), (1 - beta2**step) ** 0.5)
            for t, grad, step in zip(tensors, grads, steps, strict=True)
        )
    )
    call = native.library().fallow_adamw_dense
    call(described, len(tensors), ctypes.byref(_hyper(hyper)), torch.get_num_threads())


def subset(t: Tensors, dim: int, index: Tensor, clock: Tensor, hyper: Hyper) -> None:
    """Update only the rows (`dim` 0) or columns (1) `index`; arguments as in `naive.subset`."""
    grad, index = t.grad.contiguous(), index.contiguous()
    described, shared = ctypes.byref(_describe(t, grad)), ctypes.byref(_hyper(hyper))
    kept, threads, library = index.numel(), torch.get_num_threads(), native.library()
    n_rows = t.param.shape[0]
    width = t.param.numel() // max(n_rows, 1)
    if dim == 0:
        library.fallow_adamw_rows(described, width, _address(index), kept, _address(clock), shared, threads)
    else:
        library.fallow_adamw_cols(described, n_rows, width, _address(index), kept, _address(clock), shared, threads)


def usable_aged(tensors: Tensors) -> tuple[bool, str]:
    """Whether `aged` serves these tensors, and why not."""
    moments = tensors.exp_avg.dtype
    if moments != tensors.exp_avg_sq.dtype or moments not in _DTYPES:
        return False, f"moments of {moments} and {tensors.exp_avg_sq.dtype}"
    if moments == torch.bfloat16:
        if tensors.master is not None:
            return False, "bf16 moments beside an fp32 master"
        state = (tensors.param, tensors.exp_avg, tensors.exp_avg_sq)
        served = tensors.param.device.type == "cpu" and {tensors.param.dtype, tensors.grad.dtype} <= set(_DTYPES)
        return served and all(x.is_contiguous() for x in state), "device, dtype or strides"
    return usable(tensors)


def aged(t: Tensors, aged: Aged, hyper: Hyper) -> None:
    """As `naive.aged`, in one pass over memory."""
    grad, age = t.grad.contiguous(), aged.age.contiguous()
    native.library().fallow_adamw_aged(
        ctypes.byref(_describe(t, grad)),
        _address(age),
        _address(aged.step_size),
        _address(aged.bias2_sqrt),
        aged.offset,
        aged.salt,
        t.exp_avg.dtype == torch.bfloat16,
        ctypes.byref(_hyper(hyper)),
        torch.get_num_threads(),
    )
