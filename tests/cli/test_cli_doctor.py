"""`fallow doctor` on the machine the tests run on: what it says must agree with what that machine shows elsewhere."""

from __future__ import annotations

import json
import platform
from typing import Any

import psutil
import pytest
import torch

from fallow import cli, machine
from fallow.cli import doctor


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return doctor.examine()


def test_json_is_one_object_with_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert set(parts) == {"machine", "software", "packages", "gpus", "precision", "matmul", "ops"}


def test_machine_agrees_with_the_system(found: dict[str, Any]) -> None:
    machine = found["machine"]
    assert machine["memory_total"] == psutil.virtual_memory().total
    assert 0 < machine["memory_free"] <= machine["memory_total"]
    assert machine["disk_free_here"] > 0
    assert found["software"]["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_precision_is_a_dtype_with_a_reason(found: dict[str, Any]) -> None:
    assert isinstance(getattr(torch, found["precision"]["dtype"]), torch.dtype)
    assert len(found["precision"]["reason"]) > 10


def test_every_operation_has_one_used_backend_and_naive_works(found: dict[str, Any]) -> None:
    by_op: dict[str, dict[str, str]] = {}
    for row in found["ops"]:
        by_op.setdefault(row["op"], {})[row["backend"]] = row["status"]
        assert row["status"] != "refused" or row["reason"], f"{row['op']}/{row['backend']} refused without a reason"
    assert "subset_ffn" in by_op
    for op, backends in by_op.items():
        assert list(backends.values()).count("used") == 1, op
        assert backends["naive"] in ("used", "available"), op


def test_first_available_backend_is_the_used_one() -> None:
    rows = [
        {"op": "a", "backend": "triton", "available": False, "reason": "no GPU"},
        {"op": "a", "backend": "cpu", "available": True, "reason": ""},
        {"op": "a", "backend": "naive", "available": True, "reason": ""},
        {"op": "b", "backend": "naive", "available": True, "reason": ""},
    ]
    assert [r["status"] for r in doctor.op_backends(rows)] == ["refused", "used", "available", "used"]


def test_matmul_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = machine.matmul_rates(torch.device("cpu"), seconds=0.02)
    assert rates["fp32"] > 0.1 and rates["bf16"] > 0.1
    assert rates["bf16_over_fp32"] == pytest.approx(rates["bf16"] / rates["fp32"], rel=0.05)
    # A machine on which every product takes 10 ms does 2·1024³ operations in that time.
    monkeypatch.setattr(machine, "_median_time", lambda call, seconds: 0.010)
    assert machine.matmul_rates(torch.device("cpu"))["fp32"] == pytest.approx(2 * 1024**3 / 0.010 / 1e9, rel=1e-3)


def test_missing_package_names_its_extra() -> None:
    assert doctor.package_version("no-such-package-of-ours", "sft") == "not installed: pip install 'fallow[sft]'"
    assert doctor.package_version("torch", None) == torch.__version__


def test_tables_name_backends_and_reasons(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    row = {"op": "subset_ffn", "backend": "triton", "available": False, "reason": "install fallow[gpu]"}
    monkeypatch.setattr(doctor, "examine", lambda: {**found, "ops": doctor.op_backends([row])})
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert found["machine"]["cpu"] in shown and "precision" in shown
    assert "refused" in shown and "install fallow[gpu]" in shown
