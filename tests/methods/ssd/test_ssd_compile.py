"""torch.compile through switches: the same losses, one graph of each phase, and observations that are not compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.ssd.steps import SWITCHING, batch, made, phases
from torch._dynamo.utils import counters

TOTAL = 24


def train(how: str) -> tuple[list[float], Any]:
    torch._dynamo.reset()
    counters.clear()
    model, handle = made(**(SWITCHING | {"dense_start": 0.2}))
    if how == "layers":
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    elif how == "model":
        model.compile(backend="aot_eager")
    optimizer = handle.optimizer(lr=1e-3)
    losses = []
    for step in range(TOTAL):
        handle.before_step(step, TOTAL)
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        handle.after_step(step, TOTAL)
        model.zero_grad()
        losses.append(float(loss.detach()))
    return losses, handle


@pytest.mark.parametrize("how", ["layers", "model"])
def test_compiled_equals_eager_through_switches(how):
    want, eager = train("none")
    got, handle = train(how)
    assert phases(handle) == phases(eager) and set(phases(handle)) == {"d", "s", "m"}
    assert sum(e.repartition for e in handle.log) >= 2
    assert got == pytest.approx(want, rel=1e-5)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert 2 <= counters["stats"]["unique_graphs"] <= 6, "dense and sparse, not one for every look or switch"
