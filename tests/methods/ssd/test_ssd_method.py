"""SSD on a model: what a sparse step leaves alone, modes, and the router's gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.methods.ssd.steps import SWITCHING, batch, evaluated, logits, made, phases, train
from tests.tiny_models import tiny_model

import fallow
from fallow import SSD
from fallow.errors import ConfigError
from fallow.training import heldout

FIXED: dict[str, Any] = {
    "schedule": "fixed",
    "dense_start": 0.3,
    "monitor_every": 1,
    "sparse_share": 0.4,
    "end": "dense",
}


def leave_out(layer: Any) -> None:
    """A router by which no token chooses experts 2 and 3: of v·x, -v·x, 0, 0 the largest is one of the first two."""
    with torch.no_grad():
        layer.router[1] = -layer.router[0]
        layer.router[2:] = 0


def of_experts(handle: Any, optimizer: Any, wanted: list[int]) -> list[torch.Tensor]:
    """Weights, moments and clocks of the channels of these experts."""
    found = []
    for layer in handle.layers:
        size = layer.view.n_channels // layer.n_experts
        channels = torch.cat([torch.arange(e * size, (e + 1) * size) for e in wanted])
        for where in layer.view.parameters_along_channels():
            state = optimizer.state[where.parameter]
            index = torch.cat([channels + s * layer.view.n_channels for s in range(where.segments)])
            for value in (where.parameter.detach(), state["exp_avg"], state["exp_avg_sq"]):
                found.append(value.index_select(where.dim, index).clone())
    return found


@pytest.mark.parametrize("family", ["llama", "opt", "arcee"])
def test_experts_without_tokens_stay_bit_equal(family):
    model, handle = made(family, active=1, router_lr=0.0, **FIXED)
    optimizer = handle.optimizer(lr=1e-2, weight_decay=0.1)
    train(model, handle, optimizer, 0, 6, 20)
    handle.before_step(6, 20)
    assert phases(handle) == "dddddds"
    for layer in handle.layers:
        leave_out(layer)
    idle, busy = of_experts(handle, optimizer, [2, 3]), of_experts(handle, optimizer, [0, 1])
    routers = [layer.router.detach().clone() for layer in handle.layers]
    train(model, handle, optimizer, 6, 10, 20)
    assert all(layer.used[:2].any() and not layer.used[2:].any() for layer in handle.layers)
    assert all(torch.equal(a, b) for a, b in zip(idle, of_experts(handle, optimizer, [2, 3]), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(busy, of_experts(handle, optimizer, [0, 1]), strict=True))
    assert all(torch.equal(x.router, r) for x, r in zip(handle.layers, routers, strict=True)), "router_lr=0"
    clock = optimizer.state[handle.layers[0].view.parameters_along_channels()[0].parameter]["clock"]
    steps = clock.view(4, 16).unique(dim=1).squeeze(1).tolist()
    assert steps[2:] == [6, 6] and 6 < max(steps[:2]) <= 10
    train(model, handle, optimizer, 10, 15, 20)
    assert phases(handle)[-1] == "d"
    assert not any(torch.equal(a, b) for a, b in zip(idle, of_experts(handle, optimizer, [2, 3]), strict=True))


def test_an_expert_is_updated_when_any_micro_batch_chose_it():
    model, handle = made(active=1, schedule="always_sparse", experts=8)
    handle.before_step(0, 10)
    used = []
    for micro in range(3):
        model(input_ids=batch(micro, n=1, length=2)).logits.sum().backward()
        used.append(handle.layers[0].used.clone())
    assert all((b | ~a).all() for a, b in itertools.pairwise(used)) and used[2].sum() > used[0].sum()
    before = handle.layers[0].used.clone()
    evaluated(model)
    with handle.in_mode("sparse"):
        evaluated(model, 6)
    assert torch.equal(before, handle.layers[0].used), "evaluation is no training"


def test_the_router_learns_in_sparse_phases_only():
    model, handle = made(active=2, **FIXED)
    optimizer = handle.optimizer(lr=1e-2)
    for step in range(20):
        handle.before_step(step, 20)
        before = handle.layers[0].router.detach().clone()
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        sparse = handle.log[-1].phase == "sparse"
        for layer in handle.layers:
            gradient = layer.router.grad
            assert (gradient is not None and float(gradient.norm()) > 1e-8) == sparse, step
        optimizer.step()
        assert torch.equal(before, handle.layers[0].router) != sparse, step
        handle.after_step(step, 20) if step < 19 else None
        model.zero_grad()  # as transformers' Trainer: it does not reach the router
    assert set(phases(handle)) == {"d", "s"}


def test_the_gradient_of_the_router_does_not_add_up_over_steps():
    model, handle = made(schedule="always_sparse")
    found = []
    for _ in range(3):
        handle.before_step(0, 10)
        model(input_ids=batch(), labels=batch()).loss.backward()
        found.append(handle.layers[0].router.grad.clone())
        model.zero_grad()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_new_router_begins_with_moments_of_its_own():
    model, handle = made(**SWITCHING)
    optimizer, fresh = handle.optimizer(lr=1e-2), 0
    for step in range(30):
        handle.before_step(step, 30)
        if handle.log[-1].repartition:
            fresh += 1
            assert all(layer.router not in optimizer.state for layer in handle.layers)
            for layer, recall in zip(handle.layers, handle.partitions[-1]["recall"], strict=True):
                assert layer.router.abs().sum() > 0 and 0 < recall <= 1
        train(model, handle, optimizer, step, step + 1, 30)
        if handle.log[-1].phase == "sparse":
            assert all(layer.router in optimizer.state for layer in handle.layers)
    assert fresh >= 2


def test_all_experts_chosen_leave_nothing_to_learn():
    model, handle = made(active=4, schedule="always_sparse")
    handle.before_step(0, 10)
    model(input_ids=batch(), labels=batch()).loss.backward()
    assert all(layer.router.grad is None for layer in handle.layers)


def test_dense_mode_in_a_sparse_phase_trains_every_neuron():
    model, handle = made(active=1, schedule="always_sparse")
    stock = tiny_model("llama", hidden_act="relu")
    optimizer = handle.optimizer(lr=1e-2)
    handle.before_step(0, 10)
    for p, q in zip(stock.parameters(), model.parameters(), strict=True):
        p.data.copy_(q)
    handle.set_mode("dense")
    other = fallow.sparsify(stock, SSD(experts=4, active=1, schedule="always_dense"))
    for m, o in ((model, optimizer), (stock, other.optimizer(lr=1e-2))):
        m(input_ids=batch(), labels=batch()).loss.backward()
        o.step()
    assert handle.metrics()["ssd/active_share"] == 1.0
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_sparse_mode_makes_experts_on_the_spot():
    """Of a trained dense model, without training: with and without a batch to look at."""
    for watch in (True, False):
        model, handle = made(watch=watch)
        dense = evaluated(model)
        assert not any(layer.partitioned for layer in handle.layers)
        handle.set_mode("sparse")
        assert all(layer.partitioned and layer.router.abs().sum() > 0 for layer in handle.experts())
        assert float((evaluated(model) - dense).abs().max()) > 1e-3
        handle.set_mode("dense")
        torch.testing.assert_close(evaluated(model), dense, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="'dense' or 'sparse'"):
        handle.set_mode("half")


def test_the_sparse_mode_computes_the_chosen_experts():
    """By hand: of every token the k experts with the largest logits, unweighted."""
    _, handle = made(active=2)
    handle.set_mode("sparse")
    layer, x = handle.layers[0], torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    w, want = layer.view.weights(), []
    for token in x:
        chosen = (layer.router @ token).topk(2).indices.tolist()
        channels = torch.cat([torch.arange(16 * e, 16 * e + 16) for e in chosen])
        h = (w.w_gate_FD[channels] @ token).relu() * (w.w_up_FD[channels] @ token)
        want.append(w.w_down_DF[:, channels] @ h)
    layer.sparse = True
    torch.testing.assert_close(layer.forward(x), torch.stack(want), rtol=1e-4, atol=1e-5)


def test_evaluation_is_dense_in_a_sparse_phase_unless_asked():
    model, handle = made(active=1, schedule="always_sparse")
    dense = evaluated(model)
    handle.before_step(0, 10)
    trained = logits(model)
    assert float((trained - dense).abs().max()) > 1e-3
    torch.testing.assert_close(evaluated(model), dense, rtol=1e-4, atol=1e-5)
    with handle.in_mode("sparse"):
        assert torch.equal(evaluated(model), trained)
        with handle.in_mode("dense"):
            torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-5)
        assert torch.equal(evaluated(model), trained)
    torch.testing.assert_close(evaluated(model), dense, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), trained), "training goes on sparse"


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_held_out_loss_leaves_everything_as_it_was(mode):
    from datasets import Dataset

    ids = batch(3, n=8)
    columns = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(12).expand(8, 12)}
    data = Dataset.from_dict({k: v.tolist() for k, v in columns.items()}).with_format("torch")
    outcomes = []
    for looked in (False, True):
        model, handle = made(**SWITCHING)
        optimizer = handle.optimizer(lr=1e-2)
        losses = []
        for step in range(30):
            losses += train(model, handle, optimizer, step, step + 1, 30)
            if looked and handle.layers[0].partitioned:
                state = handle.state_dict()
                found = heldout.loss(model, data, tokens=64, batch_size=2, sparsity=handle, mode=mode)
                assert found is not None and model.training
                after = handle.state_dict()
                assert all(torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in state.items())
        assert set(phases(handle)) == {"d", "s", "m"}
        outcomes.append((losses, handle.log))
    assert outcomes[0] == outcomes[1]


def test_the_first_micro_batch_is_watched_where_none_was_given():
    model, handle = made(watch=False)
    assert handle.probe is None
    evaluated(model)
    assert handle.probe is None, "only training counts"
    mask = torch.ones_like(batch(1))
    model(input_ids=batch(1), attention_mask=mask, labels=batch(1))
    model(batch(2))
    assert torch.equal(handle.probe["input_ids"], batch(1)) and torch.equal(handle.probe["labels"], batch(1))
    long = batch(0, n=9, length=300)
    handle.watch({"input_ids": long, "num_items_in_batch": torch.tensor(7)})
    assert handle.probe.keys() == {"input_ids", "labels"} and handle.probe["input_ids"].shape == (6, 300)


def test_remove_gives_the_stock_model():
    model, handle = made(active=1, schedule="always_sparse")
    types = {n: type(m) for n, m in tiny_model("llama", hidden_act="relu").named_modules()}
    optimizer = handle.optimizer(lr=1e-2)
    train(model, handle, optimizer, 0, 3, 10)
    dense = evaluated(model)
    assert handle.remove() is model
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert torch.equal(evaluated(model), dense)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(input_ids=batch(), labels=batch()).loss.backward()
    optimizer.step()
    for layer in handle.layers:
        for where in layer.view.parameters_along_channels():
            moved = (where.parameter != before[where.name]).any(1 - where.dim)
            assert moved.float().mean() > 0.9, "its optimizer trains all of it"
    fallow.sparsify(model, SSD(experts=8, active=2))


def test_every_layer_may_have_its_own_k():
    model, handle = made(active=(1, 4), schedule="always_sparse")
    handle.before_step(0, 10)
    model(input_ids=batch(), labels=batch()).loss.backward()
    assert handle.layers[0].router.grad is not None and handle.layers[1].router.grad is None
    assert handle.metrics()["ssd/active_share"] == 5 / 8 and handle.insight()["active"] == [1, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_moved_after_it_was_made_sparse():
    model, handle = made(**SWITCHING)
    model.to("cuda")
    optimizer = handle.optimizer(lr=1e-2)
    for step in range(30):
        handle.before_step(step, 30)
        ids = batch(step).cuda()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        handle.after_step(step, 30)
        model.zero_grad()
    assert set(phases(handle)) == {"d", "s", "m"}
    handle.load_state_dict({k: v.cpu() if torch.is_tensor(v) else v for k, v in handle.state_dict().items()})
    handle.observe(30)
