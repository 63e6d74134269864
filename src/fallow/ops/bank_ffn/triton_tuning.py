"""What the Triton kernels of `bank_ffn` share: the shapes each is tuned over, and launches that overlap.

Decoding is a chain of short kernels, and a launch that waits for the one before it costs 2 to 3 µs even from a CUDA
graph. From Hopper on a kernel may be launched while its predecessor still runs (programmatic dependent launch): it
takes its place, loads weights, which nobody writes, and `wait`s before it reads what the predecessor wrote.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (as in triton_kernels.py)

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def configs(names: tuple[str, ...], small: tuple[int, ...], *shapes: tuple[int, ...]) -> list[triton.Config]:
    """Each shape is the named sizes, then warps, then steps of the loop on their way from memory (STAGES); `small` is
    what the interpreter takes."""
    return [
        triton.Config(dict(zip((*names, "STAGES"), (*s[:-2], s[-1]), strict=True)), num_warps=s[-2], num_stages=s[-1])
        for s in ([(*small, 1, 1)] if INTERPRETED else shapes)
    ]


def fitting(configs: list[triton.Config], arguments: dict[str, Any], **given: Any) -> list[triton.Config]:
    """Those whose sums, one per token and element of a tile, leave registers for the rest."""
    matrices = 1 if "BB" not in given or arguments.get("u_up", given) is None else 2  # gate and up, or `thin`'s one

    def sums(c: triton.Config) -> float:
        tile = math.prod(size for name, size in c.kwargs.items() if name != "STAGES")
        return given["T"] * tile * matrices * given.get("BB", 1) / (32 * c.num_warps)

    return [c for c in configs if sums(c) <= 64] or [min(configs, key=sums)]


def briefly(call: Callable[[], object], quantiles: Any) -> Any:
    """Time a config. Triton's own 125 ms each would make tuning a model's shapes take minutes."""
    return triton.testing.do_bench(call, warmup=3, rep=15, quantiles=quantiles)


def overlapping(like: torch.Tensor) -> bool:
    """Whether kernels on this tensor's device may be launched before their predecessors end."""
    if INTERPRETED or torch.version.hip is not None or not like.is_cuda:
        return False
    return torch.cuda.get_device_capability(like.device) >= (9, 0)


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until the kernel before this one has ended; every kernel of the chain does, so until all before it have. What is
    read sooner must be written by none of them. The next kernel may then be launched."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
