"""`fallow bench ssd` on tiny widths: every row against the fastest dense of its dtype, and a red gate prints none."""

from __future__ import annotations

import json

import pytest
import torch

from fallow import cli
from fallow.bench import gate_ssd, ssd, ssd_steps
from fallow.bench.flops import Shape
from fallow.bench.steps import Case
from fallow.errors import GateError
from fallow.ops.expert_ffn import cpu

FIELDS = {"case", "dtype", "tokens", "dense_ms", "sparse_ms", "ratio", "ideal", "efficiency", "backend"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"step-tiny": Case("step-tiny", Shape(32, 128, 2, 2, 16, layers=2, vocab=64), 2, 16)}
    monkeypatch.setattr(ssd, "SHAPES", {"tiny": (32, 128)})
    monkeypatch.setattr(ssd, "CASES", step)
    monkeypatch.setattr(ssd_steps, "CASES", step)


def test_rows_and_break_even(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ssd", "--case", "tiny", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "ssd" and found["gate"] == "passed"
    rows = found["rows"]
    pairs = [(E, K) for E in (8, 16, 32, 64) for K in (E // 8, E // 4, E // 2)]
    want = [(d, E, K) for d in ("bfloat16", "float32") for E, K in pairs]
    assert [(r["dtype"], r["experts"], r["active"]) for r in rows] == want
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["share"] == row["active"] / row["experts"] and row["ideal"] == 1 / row["share"]
        assert row["efficiency"] == pytest.approx(row["ratio"] / row["ideal"])
        assert row["dense_ms"] == min(row["dense_forms_ms"].values())
        assert row["backend"] == ("cpu" if cpu.available()[0] else "naive")
    assert found["break_even"].keys() == {f"tiny {d} E{E}" for d in ("bfloat16", "float32") for E in (8, 16, 32, 64)}


def test_printed_as_a_table(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ssd", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "share" in out and "break-even tiny float32 E16: " in out and "step-tiny" in out


def test_whole_steps_are_against_the_fastest_dense_of_any_dtype(tiny: None) -> None:
    rows = ssd_steps.rows_of_steps(["step-tiny"], rounds=2, compiled=False, experts=8, active=2)
    assert [r["dtype"] for r in rows] == ["bfloat16", "float32"]
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["dense_ms"] == min(ms for n, ms in row["forms_ms"].items() if n.startswith("dense/"))
        assert row["efficiency"] == pytest.approx(row["ratio"] / row["ideal"])
        # FFN 6·32·128, attention 8·32·32 + 2·16·32 (half of the scores), head 2·32·64, per token and forward pass
        ffn, rest = 2 * 6 * 32 * 128, 2 * (8 * 32 * 32 + 2 * 16 * 32) + 2 * 32 * 64
        assert row["ideal"] == pytest.approx((ffn + rest) / (ffn / 4 + rest))


def test_compiled_dense_counts_where_it_is_faster(tiny: None) -> None:
    rows = ssd.ffn_rows("tiny", torch.float32, rounds=1, compiled=True, experts=(8,), shares=(0.25,), tokens=16)
    assert rows[0]["dense_forms_ms"].keys() == {"dense/eager", "dense/compiled"}


@pytest.mark.parametrize(
    ("points", "at"),
    [
        ([(0.125, 1.2), (0.25, 1.5), (0.5, 2.0)], None),
        ([(0.125, 0.5), (0.25, 0.8), (0.5, 1.2)], 0.375),
        ([(0.125, 0.3), (0.25, 0.4), (0.5, 0.6)], 1.0),
        ([(0.125, 0.5), (0.25, 0.6), (0.5, 0.9)], 0.5 + 0.25 / 3),
        ([(0.25, 0.9)], 0.25),
    ],
)
def test_break_even_is_where_the_cost_reaches_that_of_dense(points, at) -> None:
    rows = [{"case": "a", "dtype": "b", "experts": 8, "share": s, "ratio": 1 / c} for s, c in points]
    assert ssd.break_even(rows) == {"a b E8": None if at is None else pytest.approx(at)}


def test_one_share_is_measured_on_demand(tiny: None) -> None:
    at = ssd.break_even_share("tiny", 8, torch.float32, rounds=1)
    assert at is None or 0 < at <= 1


def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ssd", "--case", "nowhere"]) == 2
    assert cli.main(["bench", "ssd", "--density", "0.5"]) == 2
    assert "ffn-768" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_a_wrong_kernel_turns_the_gate_red(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    assert all(error < (1e-5 if n.endswith("float32") else 2e-2) for n, error in gate_ssd.check_expert_ffn().items())
    if not cpu.available()[0]:
        pytest.skip(cpu.available()[1])
    forward, backward = cpu.forward, cpu.backward
    if wrong == "value":
        monkeypatch.setattr(cpu, "forward", lambda *arguments: forward(*arguments) * 1.1)
    else:

        def broken(*arguments) -> None:
            backward(*arguments)
            arguments[-1].coefficient_TK.mul_(1.1)

        monkeypatch.setattr(cpu, "backward", broken)
    with pytest.raises(GateError, match=r"expert_ffn/cpu: (y|dcoefficient) differs from naive .* no speed is reported"):
        gate_ssd.check_expert_ffn()
