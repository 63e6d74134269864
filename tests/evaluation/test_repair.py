"""Repairs of a planted fault: how much of the lost score comes back, what may stay, and that nothing else moves."""

from __future__ import annotations

import json

import pytest
import torch

from fallow.errors import ConfigError
from fallow.evaluation import repairs
from fallow.evaluation.accepting import Judge
from fallow.evaluation.diagnosis import nats_of
from fallow.evaluation.repairing import Asked, Documents, repair_layer
from tests.evaluation.planted import answers_of, plant, sound
from tests.training.tiny_runs import text

FAULTY = {"linear": 1, "bilinear": 0, "quantized": 2}


def learnt(made) -> torch.Tensor:
    """Windows of words and of random tokens: a random model has no text of its own."""
    ids = torch.tensor(made.tokenizer(text(11, 3000)).input_ids)
    drawn = torch.randint(2, made.model.config.vocab_size, (32, 128), generator=torch.Generator().manual_seed(3))
    return torch.cat([ids[: len(ids) // 128 * 128].view(-1, 128), drawn])


def documents(made) -> Documents:
    held = answers_of(made, count=12, lengths=(24, 32), seed=9)
    windows = torch.stack([a.ids for a in answers_of(made, count=12, lengths=(24,), seed=21)])
    return Documents(answers=answers_of(made, count=16, lengths=(24,)), held=held, texts={"held": windows})


def asked(**changes) -> Asked:
    return Asked(**{"data": ["a"], "held_data": ["b"], "steps": 60, "lengths": (24,)} | changes)


@pytest.mark.parametrize("kind", list(FAULTY))
def test_the_fault_is_mended_and_nothing_else_changes(kind) -> None:
    made, place = sound(kind), FAULTY[kind]
    papers = documents(made)
    healthy = nats_of(made, papers.held, mode="sparse")
    plant(made.sparsity.layers[place], seed=place)
    sick = nats_of(made, papers.held, mode="sparse")
    lost = sum(sick) - sum(healthy)
    assert lost > 0
    before = {n: p.clone() for n, p in made.model.state_dict().items()}
    others = [s.state_dict() for s in (layer.predictor for layer in made.sparsity.layers)]

    record = repair_layer(made, place, papers, learnt(made), asked(repairs=("keep", "tilt", "refit")))

    assert json.loads(json.dumps(record)) == record
    assert record["enough"] and record["recovered"] >= 0.8, record["tries"]
    back = (sum(sick) - sum(nats_of(made, papers.held, mode="sparse"))) / lost
    assert back >= 0.8, f"of what held-out documents lost, {back:.0%} came back"
    assert record["accepted"] == (
        "a bias per channel" if kind == "quantized" else "the predictor fitted anew on long text"
    )
    assert [t["name"] for t in record["tries"]][:2] == ["keep", "tilt"], "cheapest first"
    assert record["recall"]["after"] > record["recall"]["before"] + 0.1
    assert all(torch.equal(p, before[n]) for n, p in made.model.state_dict().items()), "no weight of the model moves"
    for n, layer in enumerate(made.sparsity.layers):
        assert layer.keep == 8
        if n != place:
            assert all(torch.equal(v, others[n][k]) for k, v in layer.predictor.state_dict().items())
    assert record["changed"] and all(name.startswith("predictor.") for name in record["changed"])
    assert f"Layer {place}: " in record["summary"] and record["density"]["exception"] == ""


@pytest.mark.parametrize("name", ["finetune", "lm"])
def test_repairs_that_train_weights_touch_one_layer_and_help(name) -> None:
    made = sound("bilinear")
    layers = made.sparsity.layers
    layers[1].keep = 2
    layers[1].stale()
    shop = repairs.Workshop(subject=made, place=1, windows_NT=learnt(made), steps=60, rows=256, lr=3e-3)
    x = shop.held_TD
    with torch.no_grad():
        wanted = layers[1].view.dense(x)

    def distance() -> float:
        with torch.no_grad():
            return float((layers[1]._masked(x, layers[1].view.weights()) - wanted).square().mean())

    def loss() -> float:
        ids = shop.windows_NT[:8]
        with made.evaluated("sparse") as model:
            return float(model(input_ids=ids, labels=ids).loss)

    measure = distance if name == "finetune" else loss
    start = measure()
    before = {n: p.clone() for n, p in made.model.state_dict().items()}
    snapshot = repairs.Snapshot(layers[1])
    (way,) = repairs.ways(layers[1], (name,), [])
    way.run(shop)
    assert measure() < 0.9 * start if name == "finetune" else measure() < start
    moved = {n for n, p in made.model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert moved < set(snapshot.changes())
    assert all(p.requires_grad and p.grad is None for p in made.model.parameters())
    snapshot.restore()
    assert snapshot.changes() == [] and measure() == start
    assert all(torch.equal(p, before[n]) for n, p in made.model.state_dict().items())


def test_a_larger_keep_is_an_exception_that_is_said() -> None:
    made = sound("quantized")
    papers = documents(made)
    layer = made.sparsity.layers[1]
    layer.keep = 1
    layer.stale()
    record = repair_layer(made, 1, papers, learnt(made), asked(repairs=("keep",), target=0.2))
    assert record["accepted"].startswith("keep ") and layer.keep == 2 and record["enough"]
    assert record["changed"] == [f"keep 1 → {layer.keep}"]
    assert record["density"]["after"] > record["density"]["before"]
    assert f"layer 1 keeps {layer.keep} of 16 channels instead of 1" in record["summary"]


def test_a_repair_that_harms_another_text_is_refused_and_taken_back() -> None:
    made = sound("bilinear")
    papers = documents(made)
    judge = Judge(subject=made, answers=papers.held, texts=papers.texts, sick={"drawn"})
    plant(made.sparsity.layers[1], seed=1)
    before = judge.measure()
    snapshot = repairs.Snapshot(made.sparsity.layers[1])
    made.sparsity.layers[1].keep = 1
    made.sparsity.layers[1].stale()
    found = judge.verdict(before, judge.measure())
    assert not found["accepted"] and found["gain"]["mean"] < 0
    assert any("not above zero" in reason for reason in found["reasons"])
    snapshot.restore()

    plant(made.sparsity.layers[2], seed=2)  # a change elsewhere that the text must notice
    worse = judge.verdict(before, judge.measure())
    assert any("loss on held leaves its interval" in r for r in worse["reasons"]) or worse["gain"]["mean"] < 0


def test_a_layer_without_a_fault_and_bad_settings_are_refused() -> None:
    made = sound("quantized")
    papers = documents(made)
    for layer in made.sparsity.layers:
        layer.keep = 16
        layer.stale()
    with pytest.raises(ConfigError, match=r"with layer 0 dense no task and length gains.*fallow diagnose"):
        repair_layer(made, 0, papers, learnt(made), asked())
    with pytest.raises(ConfigError, match="no layer 4; the model has layers 0 to 3"):
        repair_layer(made, 4, papers, learnt(made), asked())
    for bad, words in (
        ({"target": 0}, "target"),
        ({"repairs": ("magic",)}, "known are keep"),
        ({"data": []}, "--data"),
    ):
        with pytest.raises(ConfigError, match=words):
            asked(**bad)
    assert asked(lengths=(1024, 2048)).between() == (1536,) and asked().between() == (30,)
