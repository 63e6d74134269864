"""`fallow bench`: what it prints, and that a red gate prints no figure. The timing itself is stubbed out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fallow import cli
from fallow.bench import sat
from fallow.cli.bench import break_even_lines
from fallow.errors import GateError

ROW = {
    "case": "1b-layer",
    "omit": 0.5,
    "dtype": "bfloat16",
    "tokens": 2048,
    "dense_ms": 1234.5,
    "sparse_ms": 700.25,
    "ratio": 1.763,
    "ideal": 1.9,
    "efficiency": 0.928,
    "backend": "cpu",
}
RESULT = {
    "bench": "sat",
    "machine": {"cpu": "a CPU", "cores": 2},
    "gate": "passed",
    "rows": [ROW],
    "break_even": {"1b-layer": 0.07, "7b-layer": None},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the measurement by RESULT and keeps what it was asked."""
    kept: dict[str, Any] = {}

    def run(**options: Any) -> dict[str, Any]:
        kept.update(options)
        return RESULT

    monkeypatch.setattr(sat, "run", run)
    return kept


def test_json_is_one_object_with_the_figures(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "sat", "--json", "--case", "1b-layer", "--case", "7b-layer", "--quick"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT
    assert asked == {"cases": ["1b-layer", "7b-layer"], "quick": True, "omit_in": "forward+backward"}


def test_table_shows_the_figures(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main(["bench", "sat"]) == 0
    shown = capsys.readouterr().out
    for figure in ("1b-layer", "2,048", "1,234.5", "700.2", "1.76×", "1.90×", "93%", "cpu"):
        assert figure in shown
    assert "break-even 1b-layer: faster above omit 0.07" in shown
    assert asked == {"cases": None, "quick": False, "omit_in": "forward+backward"}


def test_red_gate_prints_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def red(**_options: Any) -> dict[str, Any]:
        raise GateError("subset_ffn[cpu] dx differs by 0.3")

    monkeypatch.setattr(sat, "run", red)
    for flags in ([], ["--json"]):
        assert cli.main(["bench", "sat", *flags]) == 1
        assert capsys.readouterr() == ("", "fallow: error: subset_ffn[cpu] dx differs by 0.3\n")


def test_unknown_names_are_bad_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "sta"]) == 2
    assert "invalid choice: 'sta'" in capsys.readouterr().err
    assert cli.main(["bench", "sat", "--case", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert cli.main(["bench", "sat", "--omit-in", "nothing"]) == 2
    assert "'weight_grad'" in capsys.readouterr().err


def test_rates_and_passes_are_asked_for(asked: dict[str, Any]) -> None:
    assert cli.main(["bench", "sat", "--omit", "0.5", "--omit", "0.75", "--omit-in", "weight_grad"]) == 0
    assert asked == {"cases": None, "quick": False, "omit_in": "weight_grad", "rates": (0.5, 0.75)}


def test_break_even_lines_say_when_there_is_none() -> None:
    assert break_even_lines({"a": 0.125, "b": None}) == [
        "break-even a: faster above omit 0.12",
        "break-even b: none found at the rates measured",
    ]
