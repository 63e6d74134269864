"""Switches with k = E leave the loss where it would have been: weights and moments move together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.ssd.steps import made, phases, train

from fallow.methods.ssd import method as ssd_method
from fallow.methods.ssd.permuting import permute

TOTAL = 40
ALL: dict[str, Any] = {"experts": 4, "active": 4}
FIXED: dict[str, Any] = ALL | {
    "schedule": "fixed",
    "dense_start": 0.1,
    "monitor_every": 1,
    "sparse_share": 0.2,
    "dense_share": 0.1,
    "end_share": 0.2,
}


def pair(family: str, dtype: torch.dtype = torch.float32, **optimizer: Any) -> tuple[Any, Any]:
    """Losses with switches, and of the same run without."""
    clip = optimizer.pop("clip", None)
    found = []
    for settings in (FIXED, ALL | {"schedule": "always_dense"}):
        model, handle = made(family, dtype=dtype, **settings)
        losses = train(model, handle, handle.optimizer(lr=1e-3, **optimizer), 0, TOTAL, TOTAL, clip=clip)
        found.append(torch.tensor(losses, dtype=torch.float64))
        if settings is FIXED:
            assert phases(handle) == "dddd" + "ssssssss" + "dddd" + "ssssssss" + "dddd" + "ssss" + "mmmmmmmm"
            assert sum(e.repartition for e in handle.log) == 3
            assert not any(torch.equal(x.ids, x.ids.sort().values) for x in handle.layers), "neurons moved"
    return found[0], found[1]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other) / other).abs().max())


@pytest.mark.parametrize("family", ["llama", "opt", "arcee"])
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1, "clip": 0.5}], ids=["plain", "weight-decay-and-clipping"]
)
def test_fp32_within_1e_5_at_every_step(family, settings):
    with_switches, without = pair(family, **settings)
    assert apart(with_switches, without) < 1e-5
    assert float(without.std()) > 1e-3, "and the model trains"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bf16_with_fp32_masters(family):
    """bf16 has 8 bits: sums in another order differ by 0.4 %, and the loss by less."""
    with_switches, without = pair(family, torch.bfloat16, weight_decay=0.1)
    assert apart(with_switches, without) < 4e-3


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_bound_sees_moments_that_stay_behind(family, monkeypatch):
    monkeypatch.setattr(ssd_method, "permute", lambda view, order, optimizer: permute(view, order, None))
    assert apart(*pair(family)) > 1e-4


def test_the_bound_sees_a_matrix_that_stays_behind(monkeypatch):
    def partly(view: Any, order: torch.Tensor, optimizer: Any) -> None:
        kept = view.weights().w_down_DF.detach().clone()
        permute(view, order, optimizer)
        with torch.no_grad():
            view.weights().w_down_DF.copy_(kept)

    monkeypatch.setattr(ssd_method, "permute", partly)
    assert apart(*pair("llama")) > 1e-3
