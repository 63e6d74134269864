"""`import fallow` is cheap and lazy, and the public names resolve. Each check runs in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fallow


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_at_most_two_seconds() -> None:
    seconds = [
        float(python("import time; t = time.perf_counter(); import fallow; print(time.perf_counter() - t)"))
        for _ in range(3)
    ]
    assert min(seconds) <= 2.0


@pytest.mark.parametrize("module", ["fallow", "fallow.cli"])
def test_import_brings_no_heavy_library(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*sys.modules)").split()
    assert not {"torch", "transformers", "numpy", "rich", "yaml"} & set(loaded)
    assert module in loaded


def test_public_names_resolve() -> None:
    assert fallow.SAT.__name__ == "SAT"
    assert {name: getattr(fallow, name) is not None for name in fallow.__all__} == dict.fromkeys(fallow.__all__, True)
    assert set(fallow.__all__) <= set(dir(fallow))


def test_unknown_name_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'SATT'.*SAT.*sparsify"):
        _ = fallow.SATT  # type: ignore[attr-defined]


def test_import_leaves_torch_settings_alone() -> None:
    told = python(
        "import torch; before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),"
        " torch.initial_seed())\n"
        "import fallow; fallow.SAT; fallow.sparsify\n"
        "after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed())\n"
        "print(before == after, torch.cuda.is_initialized())"
    )
    assert told == "True False"
