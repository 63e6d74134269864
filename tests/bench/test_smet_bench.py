"""`fallow bench smet` on tiny widths: every row has its figures against the right dense, and a red gate prints none."""

from __future__ import annotations

import json

import pytest
import torch

from fallow import cli
from fallow.bench import smet, steps
from fallow.bench.flops import Shape
from fallow.bench.gate import check_smet
from fallow.errors import GateError
from fallow.ops import packed
from fallow.ops.block_linear import op as block_op

TINY = steps.Case("tiny", Shape(64, 128, 2, 2, 32, layers=2, vocab=64), 1, 16)
FIELDS = {"case", "dtype", "tokens", "dense_ms", "sparse_ms", "ratio", "ideal", "efficiency", "backend"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(smet.CASES, "tiny", TINY)
    monkeypatch.setattr(smet.block, "SHAPES", ((70, 90),))


def test_rows_are_against_the_fastest_dense_and_count_every_byte(
    tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(["bench", "smet", "--case", "tiny", "--density", "0.25", "--density", "0.5", "--quick", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "smet" and found["gate"] == "passed"
    rows = found["rows"]
    assert [(r["dtype"], r["density"], r["form"]) for r in rows] == [
        (dtype, density, form)
        for dtype in ("bfloat16", "float32")
        for density in (0.25, 0.5)
        for form in ("fan_in", "block 64")
    ]
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["forms_ms"].keys() == {"dense/bfloat16/eager", "dense/float32/eager", f"sparse/{row['dtype']}/eager"}
        assert row["dense_ms"] == min(ms for name, ms in row["forms_ms"].items() if name.startswith("dense/"))
        assert row["ratio"] <= row["ratio_same_dtype"] * 1.5  # medians of paired ratios, not ratios of medians
        assert row["efficiency"] == pytest.approx(row["ratio"] / row["ideal"])
    assert rows[0]["ideal"] == 1.0 and 1.0 < rows[1]["ideal"] < 4.0
    # one bit and 17 bytes per living weight, an offset per row of 64 or 128 weights: clocks and gradients are in it
    assert 0.27 < rows[0]["state_bytes"] < 0.29


def test_layers_take_the_densities_asked_for(tiny: None) -> None:
    found = smet.run(["layers"], rounds=1, densities=(0.3,))
    assert {(r["density"], r["block"]) for r in found["rows"]} == {(0.3, b) for b in smet.block.BLOCKS}


def test_a_wrong_kernel_turns_the_gate_red(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(error < 0.02 for error in check_smet().values())
    real = packed.cpu.compress if packed.cpu.available()[0] else packed.naive.compress
    with monkeypatch.context() as patch:
        module = packed.cpu if packed.cpu.available()[0] else packed.naive
        patch.setattr(module, "compress", lambda dense, *rest: real(dense * 1.1, *rest))
        with pytest.raises(GateError, match=r"packed_linear/.*dvalues"):
            check_smet()
    if not packed.cpu.available()[0]:
        return
    forward = block_op._KERNELS["cpu"].forward
    monkeypatch.setattr(block_op._KERNELS["cpu"], "forward", lambda *a: forward(*a) + torch.ones(()))
    with pytest.raises(GateError, match="block_linear/cpu: y"):
        check_smet()


def test_break_even_is_where_tiles_cost_as_much_as_dense() -> None:
    rows = [{"case": "a", "form": "block 64", "density": d, "ratio": r} for d, r in ((0.25, 2.0), (0.5, 1.25))]
    assert smet.break_even(rows)["a"] == pytest.approx(0.25 + 0.5 / 1.2)
    assert smet.break_even(rows[:1]) == {"a": None}
    assert smet.break_even([rows[0] | {"form": "fan_in"}]) == {}
