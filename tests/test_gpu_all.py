"""benchmarks/gpu_all.py where there is no GPU: it says what is missing, and a red gate prints no speed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_all.py"
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install 'fallow[gpu]')"
)

RED = f"""
import runpy, sys
import torch
import fallow.bench.gate as gate
gate.TOLERANCE = {{torch.float32: 0.0}}
sys.argv = ["gpu_all.py", "--interpret-check", "--only", sys.argv[1]]
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


@needs_triton
@pytest.mark.parametrize("bench", ["sat", "upcycle"])
def test_red_gate_exits_1_and_prints_no_ratio(bench):
    done = run("-c", RED, bench, TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr
    assert "differs from naive" in done.stderr and "no speed is reported" in done.stderr
    assert "ideal" not in done.stdout and "passed" not in done.stdout


@needs_triton
def test_upcycles_gate_is_green_in_the_interpreter():
    done = run(str(SCRIPT), "--interpret-check", "--only", "upcycle")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed") == 13 and "ideal" not in done.stdout


UPCYCLE = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_upcycle, gpu_upcycle_decode
from fallow.serving import layered
from gpu_timing import Settings
from gpu_upcycle_gate import SMALL
from fallow.bench.flops import Shape
from fallow.bench.steps import Case

settings = Settings(device="cpu", rounds=1, warm_up=0, max_autotune=False)
gpu_upcycle.compile_options = lambda settings: {{"dense/eager": {{}}}}
gpu_upcycle.graphed = lambda step: step
gpu_upcycle.LAYERS = 1
for tokens, kinds in ((1, gpu_upcycle.KINDS), (2, gpu_upcycle.KINDS_OF_SEVERAL)):
    forms, read = gpu_upcycle.ffn_forms(SMALL, tokens, settings)
    whole, alive = 3 * SMALL.F * SMALL.D * 2, read["scores"]
    assert alive == whole / 4 if tokens == 1 else whole / 4 < alive <= whole / 2, (tokens, alive, whole)
    assert tokens > 1 or read["linear-int8"] == alive + (SMALL.rank + 4) * SMALL.F + SMALL.rank * (SMALL.D + 4)
    rows = gpu_upcycle.bench_ffn(SMALL, tokens, settings)
    assert [r["predictor"] for r in rows] == list(kinds)
forms, _ = gpu_upcycle.ffn_forms(SMALL, 1, settings)
by_rows, stock = forms["dense/rows"]()[0].float(), forms["dense/eager"]()[0].float()
assert (by_rows - stock).norm() < 2e-2 * stock.norm()
case = Case("tiny", Shape(48, 128, 4, 2, 12, layers=2, vocab=300), 1, 8)
found = {{row["predictor"]: row for row in gpu_upcycle_decode.bench_decode(settings, (case,))}}
assert found.keys() == {{"linear", "quantized", "bilinear"}}, found
row = found["linear"]
ways = ("stock", *gpu_upcycle_decode.WAYS)
assert len(ways) == 5
assert row["dense_forms_ms"].keys() == {{f"dense/{{way}}" for way in ways}}
assert {{f.split("/")[0] for f in row["forms_ms"]}} == {{"dense", "sparse"}} and len(row["forms_ms"]) == 4
assert not row["notes"], row["notes"]
core = Settings(device="cpu", rounds=1, warm_up=0, max_autotune=False, part="core")
found = {{row["predictor"]: row for row in gpu_upcycle_decode.bench_decode(core, (case,))}}
assert found.keys() == {{"linear", "quantized"}} and not found["linear"]["notes"]
assert found["linear"]["dense_forms_ms"].keys() == {{"dense/stock", "dense/compiled-attention", "dense/compiled-qkv"}}
layered.one_query, right = lambda *a, **k: (0 * right(*a, **k)[0], None), layered.one_query
notes = {{}}
stock = gpu_upcycle_decode.stock_model(case, core)
model, handle = gpu_upcycle_decode.sparse_model(stock, "linear")
kept = [layer.keep for layer in handle.layers]
forms = gpu_upcycle_decode.forms_of("sparse", model, handle.layers, core, gpu_upcycle_decode.WAYS, notes)
assert "all channels alive" in notes["sparse/compiled-qkv"] and "sparse/compiled-qkv" not in forms, notes
assert [layer.keep for layer in handle.layers] == kept == [16, 16]
factors = 16 * (48 + 128) + 4 * (16 + 128)
assert row["megabytes"]["dense"] * 1e6 - row["megabytes"]["sparse"] * 1e6 == 2 * 2 * 3 * 48 * 128 * 0.75 - 2 * factors
"""


@needs_triton
def test_upcycles_forms_run():
    """Every form that a GPU would time, but for compilation and CUDA graphs."""
    done = run("-c", UPCYCLE, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ideal") == 5 + 3 + 3 + 2


def test_break_even_of_upcycle(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    break_even_by_form = import_module("gpu_upcycle").break_even_by_form
    rows = [
        {"case": "ffn", "predictor": kind, "tokens": t, "ratio": r}
        for kind, ratios in {"a": (2.0, 0.8), "b": (3.0, 1.5), "c": (0.9, 0.5)}.items()
        for t, r in zip((1, 4), ratios, strict=True)
    ]
    found = break_even_by_form([*rows, {"case": "decode", "predictor": "a", "ratio": 1.7}])
    assert found == {"ffn/a": pytest.approx(3.0), "ffn/b": 4.0, "ffn/c": None}
