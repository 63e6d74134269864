"""Neurons in another order: the same function in every family, their numbers known, their state beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.ssd.steps import SWITCHING, batch, evaluated, made, train
from tests.tiny_models import FAMILIES, tiny_model

import fallow
from fallow import SSD, anatomy
from fallow.methods.ssd.permuting import permute


def rows(view: Any) -> torch.Tensor:
    """All weights of each neuron, one after the other: [F, ...]."""
    w = view.weights()
    parts = [w.w_gate_FD, w.w_up_FD, w.w_down_DF.t(), w.b_gate_F, w.b_up_F]
    return torch.cat([p.detach().reshape(view.n_channels, -1) for p in parts if p is not None], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family):
    """In every family, through three partitions of which each is another."""
    model: Any = tiny_model(family)
    before = evaluated(model)
    handle: Any = fallow.sparsify(model, SSD(experts=4, active=1, partition="random", relu="ignore"))
    first = [rows(layer.view) for layer in handle.layers]
    for step in range(3):
        handle.partition(step)
        torch.testing.assert_close(evaluated(model), before, rtol=1e-4, atol=2e-5)
        for layer, start in zip(handle.layers, first, strict=True):
            assert torch.equal(rows(layer.view), start[layer.ids]), "ids say where each neuron came from"
            assert not torch.equal(rows(layer.view), start)
    torch.testing.assert_close(evaluated(handle.remove()), before, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_of_the_optimizer_goes_along(family):
    """Moments, and clocks of lazy rows, of every parameter along channels; the rest stays."""
    model: Any = tiny_model(family)
    views = anatomy.inspect(model).ffns
    handle: Any = fallow.sparsify(model, SSD(experts=4, active=1, schedule="always_sparse", router_lr=0, relu="ignore"))
    optimizer = handle.optimizer(lr=1e-2)
    with torch.no_grad():
        handle.before_step(0, 10)
        for layer in handle.layers:
            layer.router[2:] = 0
            layer.router[0] = -layer.router[1]  # so that experts 2 and 3 are left out, and clocks are kept
    train(model, handle, optimizer, 1, 3, 10)
    model(input_ids=batch(7), labels=batch(7)).loss.backward()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    along = {id(w.parameter): (w, views[n]) for n in range(2) for w in views[n].parameters_along_channels()}
    want, clocks = {}, 0
    for p in model.parameters():
        state = {**optimizer.state[p], "weight": p.detach(), "grad": p.grad}
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            value = value.clone()
            if id(p) in along:
                where = along[id(p)][0]
                index = torch.cat([order + s * 64 for s in range(where.segments)])
                clocks += name == "clock"
                value = value.index_select(0 if value.dim() == 1 else where.dim, index)
            want[id(p), name] = value
    for view in views:
        permute(handle.layers[view.layer].view, order, optimizer)
    assert clocks == len(along) > 0
    for p in model.parameters():
        state = {**optimizer.state[p], "weight": p.detach(), "grad": p.grad}
        for name, value in state.items():
            if (id(p), name) in want:
                assert torch.equal(value, want[id(p), name]), name


def test_ids_follow_a_run_that_does_not_learn():
    """lr 0: after seven switches every neuron is still what it was, at the place its number says."""
    model, handle = made("llama", **SWITCHING)
    first = [rows(layer.view) for layer in handle.layers]
    train(model, handle, handle.optimizer(lr=0.0), 0, 40, 40)
    assert sum(e.repartition for e in handle.log) >= 3
    for layer, start in zip(handle.layers, first, strict=True):
        assert torch.equal(rows(layer.view), start[layer.ids])
        assert torch.equal(layer.ids.sort().values, torch.arange(64))
    one, other = handle.layers
    assert not torch.equal(one.ids, other.ids)


def test_patterns_are_compared_neuron_by_neuron():
    """With weights that stay, activations do too: similarity is 1 through every switch, as neurons keep their names."""
    model, handle = made("llama", **(SWITCHING | {"partition": "random"}))
    train(model, handle, handle.optimizer(lr=0.0), 0, 40, 40)
    seen = [e.seen.similarity for e in handle.log]
    assert seen[0] is None and min(seen[1:]) > 1 - 1e-5
    assert len({tuple(p["step"] for p in handle.partitions)}) == 1 and len(handle.partitions) >= 3
    overlaps = [o for p in handle.partitions[1:] for o in p["overlap"]]
    assert max(overlaps) < 0.6, "chance partitions"
