"""benchmarks/sat_pace.py on a tiny model: every form takes its own steps, and leaves the model as it found it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import sat_pace
from tests.training.tiny_runs import settings

from fallow.methods.sat import layers
from fallow.optim import AdamW
from fallow.training.settings import resolve

SAT = {"method": "sat", "omit": 0.5, "refresh_every": 3}


def test_every_form_takes_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {
        "dense": resolve(settings(tmp_path), {}),
        "sat": resolve(settings(tmp_path, **SAT), {}),
        "lazy": resolve(settings(tmp_path, **SAT, lazy=True), {}),
    }
    sparse, lazily, chosen = [], [], []
    run, step, choose = layers.SparseFFN._run, AdamW.step, layers.SparseFFN._select_now
    monkeypatch.setattr(
        layers.SparseFFN, "_run", lambda self, x, kept: (sparse.append(len(kept)), run(self, x, kept))[1]
    )
    monkeypatch.setattr(AdamW, "step", lambda self, **kw: (lazily.append(self.lazy is not None), step(self, **kw))[1])
    monkeypatch.setattr(layers.SparseFFN, "_select_now", lambda self, x: (chosen.append(1), choose(self, x))[1])
    timing, turn = sat_pace.measure(arms, rounds=2)
    assert turn == 3 and {name: len(s) for name, s in timing.seconds.items()} == {"dense": 2, "sat": 2, "lazy": 2}
    assert sparse == [32] * (2 * 3 * turn * 2), "two forms, three rounds of a turn, two layers, half of 64 channels"
    assert len(chosen) == 2 * 3 * 2, "once a turn and layer, as often as in a run"
    assert lazily.count(True) == 3 * turn and lazily.count(False) == 2 * 3 * turn
