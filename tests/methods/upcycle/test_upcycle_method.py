"""What the handle promises: starts, first stage, what is added to the loss, the state and its hash, the controls."""

from __future__ import annotations

import pytest
import torch
from tests.methods.upcycle.upcycled_models import SMALL, loss_of, upcycled
from tests.tiny_models import tiny_batch, tiny_model

import fallow
from fallow.errors import CheckpointError, ConfigError, UnsupportedModelError
from fallow.methods.upcycle.allocation import allocate, sensitivity
from fallow.methods.upcycle.learning import gated, in_bank_cross_entropy
from fallow.methods.upcycle.lowrank import gram, low_rank


def test_a_layer_can_be_restored_alone():
    model, handle = upcycled()
    handle.set_mode("sparse")
    model.eval()
    sparse = float(loss_of(model).detach())
    for layer in handle.layers:
        layer.mode = "dense"
    assert float(loss_of(model).detach()) == pytest.approx(float(loss_of(tiny_model("llama").eval()).detach()))
    handle.layers[0].mode = "sparse"
    assert float(loss_of(model).detach()) != pytest.approx(sparse)


def test_starts_from_inputs_beat_starts_from_weights_and_chance():
    found = {}
    for watched in (False, True):
        _, handle = upcycled(predictor="bilinear", rank=8)
        if not watched:
            for layer in handle.layers:
                layer.predictor.start(layer.view.weights(), None)
        handle.watch(tiny_batch(batch=16, tokens=64))
        found[watched] = handle.look(0)
    mean = {k: sum(v["recall"]) / 2 for k, v in found.items()}
    chance = sum(found[True]["random"]) / 2
    assert mean[True] >= mean[False] > chance


def test_the_first_stage_raises_recall_and_leaves_the_model_alone():
    model, handle = upcycled(predictor="linear", rank=16, fit_tokens=20000, fit_lr=1e-2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    handle.watch(tiny_batch(seed=77, batch=8, tokens=64))
    for layer in handle.layers:
        layer.predictor.started = True
        for p in layer.predictor.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    first = handle.look(0)
    records = list(handle.prepare(tiny_batch(seed=s, batch=16, tokens=64) for s in range(100)))
    last = handle.look(1)
    assert records[-1]["tokens"] >= 20000
    assert sum(last["recall"]) > sum(first["recall"]) + 0.2
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.training


def test_too_little_data_for_the_first_stage_is_said():
    _, handle = upcycled(predictor="linear", rank=4, fit_tokens=10_000)
    with pytest.raises(fallow.FallowError, match="fit_tokens"):
        list(handle.prepare([tiny_batch()]))


def test_distillation_and_the_predictors_own_loss_enter_the_loss():
    plain, _ = upcycled(predictor="linear", rank=8, gate="hard")
    base = float(loss_of(plain).detach())
    model, handle = upcycled(predictor="linear", rank=8, gate="hard", distill=1.0)
    out = model(**tiny_batch())
    teacher = tiny_model("llama")(**tiny_batch()).logits.flatten(0, 1)
    student = out.logits.flatten(0, 1)
    wanted = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(out.loss, wanted, rtol=1e-4, atol=1e-5)
    model, handle = upcycled(predictor="linear", rank=8, gate="hard", predictor_loss=2.0)
    loss = loss_of(model)
    assert float(loss.detach()) > base
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.predictor_parameters())
    model, handle = upcycled(distill=0.5, hidden_loss=1.0)
    assert float(loss_of(model).detach()) > 0
    model.eval()
    assert float(loss_of(model).detach()) == pytest.approx(float(loss_of(upcycled()[0].eval()).detach()))


def test_another_model_can_teach(tmp_path):
    """Its divergence is that of the named model, and a model of another shape is refused before anything changes."""
    other = tiny_model("llama")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    batch = tiny_batch()
    model, handle = upcycled(distill=1.0, teacher=str(tmp_path / "other"), keep=16)  # all channels: only the teacher
    handle.set_mode("sparse")
    model.train()
    ours, theirs = model(**batch), other.eval()(**batch)
    log_p, log_q = ours.logits.float().log_softmax(-1), theirs.logits.float().log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    assert torch.allclose(ours.loss, expected, rtol=1e-3)

    tiny_model("llama", hidden_size=64).save_pretrained(tmp_path / "wide")
    for name, says in ((str(tmp_path / "wide"), "one of its shape"), (str(tmp_path / "none"), "cannot teach")):
        model = tiny_model("llama")
        with pytest.raises(ConfigError, match=says):
            fallow.sparsify(model, fallow.Upcycle(**SMALL, distill=0.5, teacher=name))
        assert torch.isfinite(loss_of(model))
    with pytest.raises(ConfigError, match="set distill above 0"):
        fallow.Upcycle(teacher="x")


@pytest.mark.parametrize("gate", ["straight_through", "soft_topk", "smooth", "hard"])
def test_gates_give_predictors_a_gradient_or_none(gate):
    model, handle = upcycled(predictor="linear", rank=8, gate=gate)
    loss_of(model).backward()
    learned = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in handle.predictor_parameters()]
    assert all(learned) if gate != "hard" else not any(learned)


def test_gates_by_hand():
    s = torch.tensor([[3.0, 1.0, -1.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False, False]])
    assert gated(s, mask, form="smooth", bank=4).tolist()[0][2:] == [0.0, 0.0]
    out = gated(s, mask, form="soft_topk", bank=4)
    assert torch.equal(out.detach(), mask.float())
    out.sum().backward()
    assert s.grad is not None
    assert int(s.grad.argmax()) in (1, 3), "steepest at the border between the last survivor and the first dead"


def test_in_bank_cross_entropy_is_zero_for_the_truth():
    size = torch.rand(5, 32) + 0.01
    assert float(in_bank_cross_entropy(size.log(), size, 16)) == pytest.approx(0, abs=1e-6)
    assert float(in_bank_cross_entropy(-size.log(), size, 16)) > 0.01


def test_annealing_ends_at_keep():
    _, handle = upcycled(anneal=0.5)
    seen = []
    for step in range(8):
        handle.before_step(step, 8)
        seen.append(handle.layers[0].keep)
        handle.after_step(step, 8)
    assert seen[0] == 16
    assert seen == sorted(seen, reverse=True)
    assert seen[4:] == [4] * 4


@pytest.mark.parametrize("selection", ["oracle", "random", "threshold"])
def test_controls_keep_as_many(selection):
    model, handle = upcycled(selection=selection)
    handle.watch(tiny_batch(batch=8, tokens=64))
    found = handle.look(0)
    assert sum(found["selected"]) / 2 == pytest.approx(0.25, abs=0.02)
    if selection == "oracle":
        assert min(found["recall"]) == pytest.approx(1.0)
    assert float(loss_of(model).detach()) > 0


def test_random_selection_is_drawn_anew_and_is_a_pure_function_of_the_step():
    losses = []
    for step in (1, 2, 1):
        model, handle = upcycled(selection="random")
        handle.before_step(step, 10)
        losses.append(float(loss_of(model).detach()))
    assert losses[0] == losses[2] != losses[1]


def test_state_goes_on_with_its_model_only():
    model, handle = upcycled(predictor="linear", rank=8)
    handle.set_mode("sparse")
    loss_of(model)
    state = handle.state_dict()
    other, theirs = upcycled(predictor="linear", rank=8)
    theirs.load_state_dict(state)
    assert float(loss_of(other).detach()) == float(loss_of(model).detach())
    stranger = tiny_model("llama", seed=5)
    with pytest.raises(CheckpointError, match="other weights"):
        fallow.sparsify(stranger, fallow.Upcycle(**SMALL, predictor="linear", rank=8)).load_state_dict(state)
    _, wider = upcycled(predictor="linear", rank=4)
    with pytest.raises(CheckpointError, match="does not fit"):
        wider.load_state_dict(state)
    _, kind = upcycled(predictor="bilinear", rank=8)
    with pytest.raises(CheckpointError, match="linear predictors"):
        kind.load_state_dict(state)
    half, again = tiny_model("llama").to(torch.bfloat16), None
    again = fallow.sparsify(half, fallow.Upcycle(**SMALL, predictor="linear", rank=8))
    again.load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bank": 24, "keep": 6}, "does not divide the 64 channels"),
        ({"keep": 17}, "between 1 and bank=16"),
        ({"keep": 0}, "between 1 and bank=16"),
        ({"keep": (4, 4, 4)}, "the model 2 layers"),
        ({"bits": 3}, "2 or 4 bits"),
        ({"group": 24}, "multiple of 16"),
        ({"gate": "smooth"}, "has no logits"),
        ({"predictor": "oracle"}, "use one of"),
        ({"predictor": "linear", "rank": 32}, "below the model's width"),
        ({"distill": 1.5}, "between 0 and 1"),
        ({"hidden_loss": 1.0}, "set distill above 0"),
        ({"fit_lr": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, says):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=says):
        fallow.sparsify(model, fallow.Upcycle(**(SMALL | settings)))
    assert getattr(model, "_fallow", None) is None
    fallow.sparsify(model, fallow.Upcycle(**SMALL))


def test_models_without_a_gate_are_refused_and_left_as_they_were():
    model = tiny_model("gpt2")
    with pytest.raises(UnsupportedModelError, match="no gate"):
        fallow.sparsify(model, fallow.Upcycle(**SMALL))
    assert float(loss_of(model).detach()) == float(loss_of(tiny_model("gpt2")).detach())


def test_low_rank_is_exact_at_full_rank_and_best_for_its_inputs():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 16, generator=g), torch.randn(200, 16, generator=g) * torch.linspace(0.1, 3, 16)
    v, u = low_rank(w, gram(x), 16)
    torch.testing.assert_close(u @ v, w, rtol=1e-3, atol=1e-3)
    errors = {}
    for name, moments in (("weights", None), ("inputs", gram(x))):
        v, u = low_rank(w, moments, 4)
        errors[name] = float((x @ (w - u @ v).t()).square().sum())
    assert errors["inputs"] < errors["weights"]


def test_allocation_spends_where_it_matters():
    kept = allocate({8: [1.0, 0.1], 16: [0.6, 0.01], 32: [0.2, 0.0]}, bank=64, average=16)
    assert sum(kept) == 32
    assert kept[0] > kept[1] >= 4
    assert allocate({16: [0.1, 0.1]}, bank=64, average=16) == (16, 16)
    _, handle = upcycled(selection="oracle")
    with pytest.raises(ConfigError, match="watch"):
        sensitivity(handle, (4,))
    handle.watch(tiny_batch(batch=8, tokens=32))
    gaps = sensitivity(handle, (2, 8))
    assert [len(v) for v in gaps.values()] == [2, 2]
    assert sum(map(abs, gaps[2])) > sum(map(abs, gaps[8]))
    assert all(layer.mode == "sparse" and layer.keep == 4 for layer in handle.layers)
