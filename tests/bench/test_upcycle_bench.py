"""`fallow bench upcycle` on tiny widths: against the fastest dense of the same dtype, and a red gate prints none."""

from __future__ import annotations

import json

import pytest
import torch

from fallow import cli
from fallow.bench import gate_upcycle, upcycle, upcycle_ffn
from fallow.bench.upcycle_ffn import Shape
from fallow.errors import ConfigError, GateError
from fallow.ops.bank_ffn import cpu

FIELDS = {"case", "dtype", "tokens", "dense_ms", "sparse_ms", "ratio", "ideal", "efficiency", "backend", "form", "keep"}
native = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upcycle_ffn, "SHAPES", {"tiny": Shape(64, 256, 16, 2)})
    monkeypatch.setattr(upcycle, "WHOLE", ())


def test_rows_and_break_even(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "upcycle", "--quick", "--json", "--keep", "16", "--keep", "32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "upcycle" and found["gate"] == "passed" and found["skipped"] == {}
    want = [
        (dtype, keep, tokens, form)
        for dtype in ("bfloat16", "int8")
        for keep in (16, 32)
        for tokens in (1, 4)
        for form in upcycle_ffn.FORMS
    ]
    assert [(r["dtype"], r["keep"], r["tokens"], r["form"]) for r in found["rows"]] == want
    for row in found["rows"]:
        assert row.keys() >= FIELDS
        assert row["share"] == row["keep"] / 64
        assert row["dense_ms"] == min(row["dense_forms_ms"].values())
        assert row["sparse_ms"] == min(row["layouts_ms"].values())
        assert row["ideal"] == pytest.approx(row["dense_bytes"] / row["sparse_bytes"], rel=1e-3)
        assert row["efficiency"] == pytest.approx(row["ratio"] / row["ideal"])
        assert row["backend"] == ("cpu" if cpu.available()[0] else "naive")
    assert len(found["break_even"]) == 2 * 2 * len(upcycle_ffn.FORMS)
    assert "tiny int8 quantized 4-bit keep 32" in found["break_even"]


def test_ideal_is_the_ratio_of_bytes(tiny: None) -> None:
    forms = ("linear", "linear int8", "quantized 4-bit")
    (a, b, c) = upcycle_ffn.rows("tiny", torch.bfloat16, keep=16, tokens=(1,), forms=forms, rounds=1, compiled=False)
    D, channels, R = 64, 256, 16
    dense = 3 * D * channels * 2
    thin = R * (D + channels)
    assert a["ideal"] == pytest.approx(dense / (dense / 4 + 2 * thin), rel=1e-3)
    assert b["ideal"] == pytest.approx(dense / (dense / 4 + thin + 4 * (R + channels)), rel=1e-3)
    assert c["ideal"] == pytest.approx(dense / (dense / 4 + 2 * D * channels * (4 + 16 / 64) / 8), rel=1e-3)


@native
def test_every_dense_form_computes_the_same(tiny: None) -> None:
    """A dense form that is fast because it is wrong would make the ratios too small, not too large, but still wrong."""
    g = torch.Generator().manual_seed(0)
    for dtype in upcycle_ffn.DTYPES:
        shape = upcycle_ffn.SHAPES["tiny"]
        gate, up, down = upcycle_ffn._weights(shape, dtype, g)
        x_TD = torch.randn(1, shape.width, generator=g).bfloat16()
        got: dict[str, torch.Tensor] = {}

        def spy(call, layers, got=got):
            return lambda: got.update({str(len(got)): call(*layers[0]).view(1, -1).float()})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upcycle_ffn, "_passes", spy)
            steps = upcycle_ffn._dense_steps(x_TD, [(gate, up, down)], dtype, False)
            steps |= upcycle_ffn._kept_steps(x_TD, {"apart": [(gate, up, down)]})
            with torch.no_grad():
                for step in steps.values():
                    step()
        assert len(got) == len(steps) >= 2
        want = got["0"]
        for name, y in zip(steps, got.values(), strict=True):
            assert (y - want).norm() <= 0.02 * want.norm(), name


def test_compiled_dense_counts_too(tiny: None) -> None:
    options = {"keep": 16, "tokens": (1,), "forms": ("linear",), "rounds": 1}
    (row,) = upcycle_ffn.rows("tiny", torch.bfloat16, compiled=True, **options)
    assert {"dense/eager", "dense/compiled", "dense/mv", "dense/row_linear"} <= row["dense_forms_ms"].keys()


def test_many_tokens_are_beyond_the_kernels(tiny: None) -> None:
    options = {"keep": 16, "forms": ("linear int8",), "rounds": 1, "compiled": False}
    (row,) = upcycle_ffn.rows("tiny", torch.bfloat16, tokens=(20,), **options)
    assert row["backend"] == ("dense" if cpu.available()[0] else "naive")
    assert not any(n.startswith("dense/bank_ffn") for n in row["dense_forms_ms"])


def test_printed_as_a_table(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "upcycle", "--case", "tiny", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "quantized 4-bit" in out and "break-even tiny bfloat16 linear keep 16: " in out


@pytest.mark.parametrize(
    ("points", "at"),
    [
        ([(1, 1.2), (2, 1.5)], None),
        ([(1, 0.5), (4, 0.8), (8, 1.2)], 6.0),
        ([(1, 0.5), (4, 0.8)], 4.0),
        ([(1, 0.9), (2, 1.1), (4, 0.9)], 1.5),
    ],
)
def test_break_even_is_where_the_cost_passes_that_of_dense(points, at) -> None:
    rows = [{"case": "a", "dtype": "b", "form": "c", "keep": 16, "tokens": t, "ratio": 1 / c} for t, c in points]
    assert upcycle.break_even(rows) == {"a b c keep 16": None if at is None else pytest.approx(at)}


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "upcycle", "--case", "nowhere"]) == 2
    assert "ffn-7b" in capsys.readouterr().err
    assert cli.main(["bench", "upcycle", "--keep", "65"]) == 2
    assert "keep 1 to 64" in capsys.readouterr().err
    assert cli.main(["bench", "ssd", "--keep", "16"]) == 2
    assert "--keep is an option of `fallow bench upcycle`" in capsys.readouterr().err


def test_a_whole_model_that_cannot_be_had_is_skipped_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fallow.bench import upcycle_decode

    def missing(*_: object, **__: object) -> list[dict]:
        raise ConfigError("no such package")

    monkeypatch.setattr(upcycle_decode, "rows", missing)
    monkeypatch.setattr(upcycle_ffn, "SHAPES", {})
    found = upcycle.run(quick=True)
    assert found["skipped"] == dict.fromkeys(upcycle.WHOLE, "no such package") and found["rows"] == []
    with pytest.raises(ConfigError, match="no such package"):
        upcycle.run(["e2e-1b"], quick=True)


def test_a_wrong_kernel_turns_the_gate_red(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(error < (1e-5 if n.endswith("float32") else 2e-2) for n, error in gate_upcycle.check_bank_ffn().items())
    if not cpu.available()[0]:
        pytest.skip(cpu.available()[1])
    right, mask = cpu.bank_ffn, cpu.bank_mask
    monkeypatch.setattr(cpu, "bank_ffn", lambda *arguments, **options: right(*arguments, **options) * 1.1)
    with pytest.raises(GateError, match=r"bank_ffn/cpu: y differs from naive .* no speed is reported"):
        gate_upcycle.check_bank_ffn()
    monkeypatch.setattr(cpu, "bank_ffn", right)
    monkeypatch.setattr(cpu, "bank_mask", lambda s, *, bank, keep: mask(-s, bank=bank, keep=keep))
    with pytest.raises(GateError, match=r"differs from (naive|a stable sort)"):
        gate_upcycle.check_bank_ffn()
