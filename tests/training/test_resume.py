"""Killed at any step and resumed equals never killed, bit for bit; faults of disk and user leave the run whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fallow.errors import CheckpointError
from fallow.training import checkpoint
from fallow.training.progress import Display
from fallow.training.run import run
from fallow.training.settings import resolve
from tests.training.tiny_runs import settings

ROOT = Path(__file__).parents[2]


def start(recipe: Path, *flags: str, limit: int | None = None) -> subprocess.Popen[str]:
    """`fallow train` in its own process; `limit` is the largest file it may write, in bytes."""
    code = "import sys; from fallow.cli import main; sys.exit(main())"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", str(recipe), *flags],
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(recipe: Path, *flags: str) -> str:
    """Run to the end and return what was printed."""
    process = start(recipe, *flags)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def write(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has logged `step`, or ended."""
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and any(f'"train", "step": {step},' in line for line in metrics.read_text().splitlines()):
            return
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_equals_never_killed(tmp_path: Path, precision: str) -> None:
    common = settings(tmp_path, precision=precision, steps=60, save_every=4, accumulate=2, batch_size=1)
    common |= {"method": "sat", "omit": 0.5, "ladder": 2, "dense_share": 0.2, "importance": "uniform"}
    run(resolve(common | {"name": "whole"}, {}), display=Display(silent=True))
    cut = write(tmp_path / "cut.yaml", common | {"name": "cut"})
    process = start(cut)
    wait_for_step(tmp_path / "runs/cut/sat/metrics.jsonl", random.randint(5, 50), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "runs/cut/sat/run.json").read_text())["status"] == "running"
    assert "resuming   from checkpoint-" in finish(cut)
    whole, again = (tmp_path / "runs" / name / "sat" for name in ("whole", "cut"))
    expected, found = (load_file(r / "model/model.safetensors") for r in (whole, again))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
    last = sorted((whole / "checkpoints").glob("checkpoint-*"), key=checkpoint.step_of)[-1].name
    states = [torch.load(r / "checkpoints" / last / "optimizer.pt")["state"] for r in (whole, again)]
    for key, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])), (key, name)
    for kind in ("train", "eval", "layers"):
        lines = [
            [e for e in map(json.loads, (r / "metrics.jsonl").open()) if e["kind"] == kind] for r in (whole, again)
        ]
        assert [e["step"] for e in lines[0]] == [e["step"] for e in lines[1]]
        assert [e.get("loss") for e in lines[0]] == [e.get("loss") for e in lines[1]]
        assert [e.get("omit_ffn") for e in lines[0]] == [e.get("omit_ffn") for e in lines[1]]
    rates = [e["omit_ffn"] for e in map(json.loads, (whole / "metrics.jsonl").open()) if e["kind"] == "train"]
    assert max(rates) == 0.5 and rates[-1] == 0.0


def test_ctrl_c_saves_says_how_to_resume_and_exits_1(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", settings(tmp_path, steps=400))
    process = start(recipe)
    wait_for_step(tmp_path / "runs/tiny/dense/metrics.jsonl", 3, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "run the same command again to resume" in out
    assert "Traceback" not in out
    record = json.loads((tmp_path / "runs/tiny/dense/run.json").read_text())
    assert record["status"] == "interrupted"
    saved = checkpoint.newest_valid(tmp_path / "runs/tiny/dense/checkpoints", print)
    assert saved is not None and checkpoint.step_of(saved) == record["totals"]["steps"] >= 3


def test_full_disk_is_one_line_and_the_last_checkpoint_stays_valid(tmp_path: Path) -> None:
    common = settings(tmp_path, steps=400, save_every=2, log_every=100)
    recipe = write(tmp_path / "r.yaml", common)
    process = start(recipe)
    folder = tmp_path / "runs/tiny/dense/checkpoints"
    while checkpoint.newest_valid(folder, lambda line: None) is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    before = checkpoint.newest_valid(folder, print)
    assert before is not None
    process = start(recipe, limit=100_000)  # the optimizer state is larger, run.json is not
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    errors = [line for line in out.splitlines() if line.startswith("fallow: error:")]
    assert len(errors) == 1 and "could not be written" in errors[0] and before.name in errors[0]
    assert "Traceback" not in out
    assert checkpoint.newest_valid(folder, print) == before
    assert not list(folder.glob(".partial*"))


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        staged = checkpoint.clear(folder, step)
        (staged / "weights").write_bytes(bytes([step]) * 1000)
        checkpoint.commit(folder, step)
    assert [p.name for p in sorted(folder.iterdir())] == ["checkpoint-4", "checkpoint-6"]
    assert checkpoint.newest_valid(folder, print) == folder / "checkpoint-6"
    said: list[str] = []
    (folder / "checkpoint-6/weights").write_bytes(b"\6" * 999 + b"\0")  # same length, other content
    assert checkpoint.newest_valid(folder, said.append) == folder / "checkpoint-4"
    assert len(said) == 1 and "checkpoint-6 is damaged (the content of weights has changed)" in said[0]
    (folder / "checkpoint-4/weights").write_bytes(b"\4" * 10)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        checkpoint.newest_valid(folder, said.append)
    assert "has 10 bytes instead of 1000" in said[-1]


def test_no_checkpoint_at_all_is_not_an_error(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "nothing", print) is None
