"""Whether experts pay is timed before the first step, and a config that does not says so with the number."""

from __future__ import annotations

import re

import pytest
import torch
from tests.tiny_models import tiny_model

import fallow
from fallow.methods.ssd import method, payoff


def handle_of(**settings):
    model = tiny_model("llama", hidden_act="relu", hidden_size=64, intermediate_size=512)
    return fallow.sparsify(model, fallow.SSD(**({"experts": 8, "active": 2} | settings)))


def clock(monkeypatch, costs):
    """Time stands still but for what each form is said to cost, in the order in which they are timed."""
    now, forms = [0.0], iter(costs * 10)
    calls = iter(range(1000))

    def read(_x: torch.Tensor) -> float:
        if next(calls) % 2:  # the end of a form
            now[0] += next(forms)
        return now[0]

    monkeypatch.setattr(payoff, "_now", read)


@pytest.mark.parametrize(
    ("costs", "ratio", "even"),
    [
        ((1.0, 0.4, 1.3), 2.5, 0.75),  # 0.1 + 1.2 share
        ((1.0, 1.25, 2.0), 0.8, None),  # 1.0 + 1.0 share
        ((2.0, 2.2, 3.4), 1 / 1.1, 0.125),  # 0.9 + 0.8 share
        ((1.0, 0.2, 0.6), 5.0, 1.0),
    ],
)
def test_ratio_and_break_even(monkeypatch, costs, ratio, even):
    clock(monkeypatch, costs)
    found = payoff.payoff(handle_of().layers[0], 32)
    assert found.ratio == pytest.approx(ratio)
    assert found.break_even == (None if even is None else pytest.approx(even))


def test_it_is_timed_and_touches_nothing():
    handle = handle_of()
    before = {k: v.clone() for k, v in handle.model.state_dict().items()}
    found = payoff.payoff(handle.layers[0], 64)
    assert 0 < found.ratio < 100
    assert all(torch.equal(v, before[k]) for k, v in handle.model.state_dict().items())
    assert all(p.grad is None for p in handle.model.parameters())


def test_a_config_that_does_not_pay_is_told_with_the_number(monkeypatch):
    monkeypatch.setattr(method, "payoff", lambda layer, tokens: payoff.Payoff(ratio=0.81, break_even=0.14))
    (line,) = handle_of().advice(2048)
    assert re.match(
        r"2 of 8 experts run 0\.81 times as fast as the dense FFN of 64×512 here: experts pay up to 14%", line
    )
    assert "\n" not in line
    assert handle_of(schedule="always_dense").advice(2048) == handle_of(active=8).advice(2048) == []
    monkeypatch.setattr(method, "payoff", lambda layer, tokens: payoff.Payoff(ratio=1.2, break_even=0.5))
    assert handle_of().advice(2048) == []
