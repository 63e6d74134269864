"""`bench.block`: every row is measured against both dense forms, and a wrong kernel gets no row."""

from __future__ import annotations

import pytest
import torch

from fallow.bench.block import layer_rows, random_tiles
from fallow.errors import GateError
from fallow.ops.block_linear import cpu, naive

SMALL = {"rounds": 1, "tokens": 33, "shapes": ((70, 90),), "blocks": (16, 32), "densities": (0.25, 0.5)}


def test_rows_say_what_was_measured():
    rows = layer_rows(**SMALL)
    assert [(r["block"], r["density"]) for r in rows] == [(16, 0.25), (16, 0.5), (32, 0.25), (32, 0.5)]
    for row in rows:
        assert row["dense_ms"] == min(row["dense_forms_ms"].values()) and len(row["dense_forms_ms"]) == 2
        assert row["ratio"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert row["efficiency"] == pytest.approx(row["ratio"] / row["ideal"])
    tiles = random_tiles(70, 90, 16, 0.25, torch.Generator().manual_seed(0))
    assert rows[0]["ideal"] == 70 * 90 / (tiles.rows_N.numel() * 256)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    module, name = (cpu, "forward") if cpu.available()[0] else (naive, "block_linear")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda x, *rest: right(x, *rest) * (1.05 if x.dtype != torch.float64 else 1))
    with pytest.raises(GateError, match="no speed is reported"):
        layer_rows(**SMALL)
