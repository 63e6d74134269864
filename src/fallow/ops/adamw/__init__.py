"""AdamW on fp32 masters, whole tensors (`dense`) or the neurons that took part (`subset`); chooses naive or native.

`fallow.optim.AdamW` is the optimizer built on it. Cost: bound by memory bandwidth, 28 bytes per bf16 weight when
native.
"""

from __future__ import annotations

from torch import Tensor

from fallow.errors import ConfigError
from fallow.ops.adamw import cpu, naive
from fallow.ops.adamw.naive import Aged, Hyper, Tensors

BACKENDS = [cpu, naive]
last_used = "none"

__all__ = ["BACKENDS", "Aged", "Hyper", "Tensors", "aged", "dense", "last_used", "subset"]


def _serves(tensors: Tensors) -> bool:
    return cpu.available()[0] and cpu.usable(tensors)[0]


def dense(tensors: list[Tensors], steps: list[int], hyper: Hyper) -> None:
    """Update whole tensors in place; `steps[i]` is the 1-based count of tensor i's update, this one included."""
    global last_used
    fast = [(t, s) for t, s in zip(tensors, steps, strict=True) if _serves(t)]
    slow = [(t, s) for t, s in zip(tensors, steps, strict=True) if not _serves(t)]
    for backend, part in ((cpu, fast), (naive, slow)):
        if part:
            backend.dense([t for t, _ in part], [s for _, s in part], hyper)
            last_used = backend.name


def subset(t: Tensors, dim: int, index: Tensor, clock: Tensor, hyper: Hyper) -> None:
    """Update rows (`dim` 0) or columns (1) `index` (int64 [K], distinct) in place; `clock` int32 counts each one's
    steps.

    Raises:
        ConfigError: `index` is out of range, or `dim` is neither 0 nor, for a matrix, 1.
    """
    global last_used
    if dim not in (0, 1) or dim >= t.param.ndim or (dim == 1 and t.param.ndim != 2):
        raise ConfigError(f"lazy dim {dim} of a tensor of shape {tuple(t.param.shape)}; use 0, or 1 of a matrix")
    if index.numel() == 0:
        return
    if int(index.min()) < 0 or int(index.max()) >= t.param.shape[dim]:
        raise ConfigError(f"lazy index outside [0, {t.param.shape[dim]}) of dim {dim}; give indices of this parameter")
    backend = cpu if _serves(t) else naive
    backend.subset(t, dim, index, clock, hyper)
    last_used = backend.name


def aged(t: Tensors, ages: Aged, hyper: Hyper) -> None:
    """Update a whole tensor in place whose entries have clocks of their own, told by an age byte each (SMET).

    Moments are fp32, or bf16 rounded stochastically (then a bf16 parameter has no master and is rounded so too).
    """
    global last_used
    backend = cpu if cpu.available()[0] and cpu.usable_aged(t)[0] else naive
    backend.aged(t, ages, hyper)
    last_used = backend.name
