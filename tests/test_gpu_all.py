"""benchmarks/gpu_all.py where there is no GPU: it says what is missing, and a red gate prints no speed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_all.py"

RED = f"""
import runpy, sys
import torch
import fallow.bench.gate as gate
gate.TOLERANCE = {{torch.float32: 0.0}}
sys.argv = ["gpu_all.py", "--interpret-check"]
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_exits_2_with_one_line():
    done = run(str(SCRIPT))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install 'fallow[gpu]')")
def test_red_gate_exits_1_and_prints_no_ratio():
    done = run("-c", RED, TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr
    assert "differs from naive" in done.stderr and "no speed is reported" in done.stderr
    assert "ideal" not in done.stdout and "passed" not in done.stdout
