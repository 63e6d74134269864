"""Which dtype the weights train in, chosen in this one place, with the reason that is printed.

The usual answer, mixed precision by autocast, keeps fp32 weights and casts them at every use. On CPU that is the
slowest form of all: SmolLM2-135M at 4×512 tokens on 2 AVX-512-bf16 cores ran at 425 tokens/s in pure bf16, 151 in
fp32 and 89 under autocast. So bf16 here means bf16 weights, with fp32 masters in the optimizer (`fallow.optim`), and
autocast is never used. A CPU that cannot multiply bf16 emulates it, slower than fp32; there fp32 wins. One that can is
not always faster for it: an Intel Xeon with AVX-512-bf16 and no AMX made 1.8 times as many fp32 products. So on a CPU a
matrix product is timed, 0.3 s once per process, unless several processes train together: they must agree.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Literal, NamedTuple

import torch

from fallow import machine
from fallow.errors import ConfigError

Precision = Literal["auto", "bf16", "fp32"]
_WORTH = 0.9
"""bf16 products may be this much slower than fp32 ones and still win: activations and gradients are half as large."""


class Choice(NamedTuple):
    """A dtype for the weights, and why."""

    dtype: torch.dtype
    reason: str


def choose(device: torch.device, asked: Precision = "auto") -> Choice:
    """The fastest sound dtype on `device`, or the one asked for.

    Args:
        device: where the model will train.
        asked: "auto", or a dtype the user insists on (the reason then says what that costs, where it costs).

    Raises:
        ConfigError: `asked` is not one of "auto", "bf16", "fp32".
    """
    if asked not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"precision={asked!r} is unknown; use auto, bf16 or fp32")
    fast, fact = _bf16_is_fast(device)
    if asked == "auto":
        return Choice(torch.bfloat16 if fast else torch.float32, fact)
    dtype = torch.bfloat16 if asked == "bf16" else torch.float32
    best = torch.bfloat16 if fast else torch.float32
    slower = "" if dtype is best else f"; {name_of(best)} is faster here: {fact}"
    return Choice(dtype, f"asked for by the recipe{slower}")


def of_earlier(record: dict[str, str]) -> Choice | None:
    """The choice in run.json of the run that is resumed: its checkpoints are in that dtype."""
    dtype = {name_of(d): d for d in (torch.bfloat16, torch.float32)}.get(record.get("dtype", ""))
    return None if dtype is None else Choice(dtype, record.get("reason", "as the run began"))


def name_of(dtype: torch.dtype) -> str:
    """`"bfloat16"`, `"float32"`: the dtype without torch's prefix."""
    return str(dtype).removeprefix("torch.")


def isa(device: torch.device) -> str:
    """The instruction set that decides the speed of bf16: e.g. `"amx_bf16"`, `"avx512_bf16"`, `"AVX2"`, `"sm_90"`."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    found = torch.cpu.get_capabilities()
    for flag in ("amx_bf16", "avx512_bf16"):
        if found.get(flag):
            return flag
    return torch.backends.cpu.get_cpu_capability()


@cache
def _bf16_over_fp32() -> float:
    """Once per process, so that all arms of a comparison train in one dtype."""
    return machine.matmul_rates(torch.device("cpu"), seconds=0.15)["bf16_over_fp32"]


def _bf16_is_fast(device: torch.device) -> tuple[bool, str]:
    unit = isa(device) if device.type in ("cpu", "cuda") else device.type
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return fast, f"{unit} {'has' if fast else 'lacks'} bf16 tensor cores"
    if device.type == "cpu" and unit in ("amx_bf16", "avx512_bf16"):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return True, f"the CPU multiplies bf16 natively ({unit}); fp32 masters live in the optimizer"
        ratio = _bf16_over_fp32()
        words = f"bf16 products run {ratio:.2f} times as fast as fp32 ones here ({unit})"
        return (True, f"{words}; fp32 masters live in the optimizer") if ratio >= _WORTH else (False, words)
    return False, f"no native bf16 multiplication known on this device ({unit}), fp32 is faster"
