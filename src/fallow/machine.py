"""What this machine is: one dict that every result carries, so that a figure can be read with its hardware."""

from __future__ import annotations

import os
import platform
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
