"""The dtype of the weights: by measured products on a CPU, the same for all ranks, and kept by a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fallow.errors import ConfigError
from fallow.training import precision
from fallow.training.progress import Display
from fallow.training.run import run
from fallow.training.settings import resolve
from tests.training.tiny_runs import settings

CPU = torch.device("cpu")


@pytest.fixture
def native_bf16(monkeypatch: pytest.MonkeyPatch):
    """A CPU that has the instruction, and multiplies as fast as the test says."""
    monkeypatch.setattr(precision, "isa", lambda device: "avx512_bf16")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return lambda ratio: monkeypatch.setattr(precision, "_bf16_over_fp32", lambda: ratio)


def test_the_faster_product_decides_and_the_reason_has_the_figure(native_bf16) -> None:
    for ratio, dtype in ((0.55, torch.float32), (0.95, torch.bfloat16), (2.9, torch.bfloat16)):
        native_bf16(ratio)
        chosen = precision.choose(CPU)
        assert chosen.dtype is dtype and f"{ratio:.2f}" in chosen.reason
    native_bf16(0.55)
    assert "float32 is faster here" in precision.choose(CPU, "bf16").reason
    with pytest.raises(ConfigError, match="use auto, bf16 or fp32"):
        precision.choose(CPU, "fp16")  # type: ignore[arg-type]


def test_ranks_do_not_measure_because_they_must_agree(native_bf16, monkeypatch: pytest.MonkeyPatch) -> None:
    native_bf16(0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert precision.choose(CPU).dtype is torch.bfloat16


def test_the_ratio_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    precision._bf16_over_fp32.cache_clear()
    ratio = precision._bf16_over_fp32()
    assert ratio > 0
    monkeypatch.setattr(precision.machine, "matmul_rates", lambda *a, **k: pytest.fail("measured twice"))
    assert precision._bf16_over_fp32() == ratio


def test_a_resumed_run_keeps_its_dtype(native_bf16, tmp_path: Path) -> None:
    native_bf16(2.0)
    recipe = resolve(settings(tmp_path, precision="auto", steps=4, save_every=2), {})
    record = run(recipe, display=Display(silent=True))
    assert record["precision"]["dtype"] == "bfloat16"
    folder = Path(recipe.output) / recipe.name / record["arm"]
    (folder / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    native_bf16(0.5)
    resumed = run(recipe, display=Display(silent=True))
    assert resumed["status"] == "finished" and resumed["precision"]["dtype"] == "bfloat16"
