"""What this machine is: one dict that every result carries, so that a figure can be read with its hardware."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

_ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def isa() -> list[str]:
    """The instruction sets that decide which kernels pay, of those this CPU has (Linux; elsewhere empty)."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split()
    return [name for name in _ISA if name in flags]


def describe() -> dict[str, Any]:
    """`{"cpu", "cores", "threads", "memory_gb", "gpus", "isa", "system"}`."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "isa": isa(),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries a result depends on; those not installed are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in (
        "fallow",
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "trl",
        "safetensors",
        "tokenizers",
        "triton",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def matmul_rates(device: torch.device, seconds: float = 0.3) -> dict[str, float]:
    """Measured rate of a square matrix product in fp32 and bf16, in GFLOP/s, and `bf16_over_fp32`.

    Args:
        device: torch.device; the matrices are 1024² on CPU and 4096² elsewhere, large enough to be compute-bound.
        seconds: time spent on each of the two.
    """
    n = 1024 if device.type == "cpu" else 4096
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a_NN = torch.randn(n, n, device=device).to(dtype)
        out_NN = torch.empty_like(a_NN)

        def once(a: torch.Tensor = a_NN, out: torch.Tensor = out_NN) -> None:
            torch.mm(a, a, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize()

        rates[name] = 2 * n**3 / _median_time(once, seconds) / 1e9
    rates["bf16_over_fp32"] = rates["bf16"] / rates["fp32"]
    return {name: round(rate, 2) for name, rate in rates.items()}


def _median_time(call: Callable[[], None], seconds: float) -> float:
    """Median seconds of one `call()`, over at least three and until `seconds` are spent, after one warm call."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
