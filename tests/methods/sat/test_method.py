"""What is SAT's own: importances, scopes, backward-only omission, dense loss tokens, sensitivity, lazy state."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import tiny_model

import fallow
from fallow import SAT
from fallow.errors import ConfigError
from fallow.methods.sat.importance import UnitInput, choose


def paper(**settings) -> SAT:
    """The paper's form, unless `settings` say otherwise."""
    return SAT(**{"omit": 0.5, "omit_in": "forward+backward"} | settings)


def batch(seed: int = 0, n: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 128, (n, length), generator=torch.Generator().manual_seed(seed))


def sparse(config: SAT, family: str = "llama"):
    model = tiny_model(family).train()
    return model, fallow.sparsify(model, config)


def one_step(model, handle, step: int = 0, total: int = 100, ids: torch.Tensor | None = None):
    ids = batch() if ids is None else ids
    handle.before_step(step, total)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("importance", ["uniform", "magnitude", "wanda", "maxip", "activation"])
@pytest.mark.parametrize("selection", ["topk", "sample"])
def test_every_importance_keeps_the_asked_number(importance, selection):
    model, handle = sparse(paper(omit=0.5, heads=0.5, importance=importance, selection=selection, ladder=0))
    one_step(model, handle)
    for ffn in handle.ffns:
        assert len(ffn.kept) == 32
        assert torch.equal(ffn.kept, ffn.kept.unique()), "sorted and distinct"
    assert all(len(a.kept) == 1 for a in handle.attentions)


def test_importances_disagree_and_random_changes_with_the_step():
    def kept(importance, step=0):
        model, handle = sparse(paper(importance=importance, ladder=0, refresh_every=1))
        one_step(model, handle, step)
        return [f.kept.tolist() for f in handle.ffns]

    names = ["uniform", "magnitude", "wanda", "maxip", "activation"]
    choices = [str(kept(n)) for n in names]
    assert len(set(choices)) == len(names)
    assert kept("uniform") == kept("uniform")
    assert kept("uniform", 0) != kept("uniform", 1)


def test_activation_keeps_the_channels_that_carry_the_output():
    model = tiny_model("llama").train()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 32:] *= 1e-3
    handle = fallow.sparsify(model, paper(omit=0.5, ladder=0))
    one_step(model, handle)
    assert all(f.kept.tolist() == list(range(32)) for f in handle.ffns)


def test_a_users_importance_sees_the_contract_and_is_held_to_it():
    seen = []

    def first_half(unit: UnitInput) -> torch.Tensor:
        seen.append((unit.x_SD.shape, unit.hidden(unit.x_SD).shape, unit.n_units, len(unit.w_in)))
        return -torch.arange(unit.n_units).float()

    model, handle = sparse(paper(importance=first_half, ladder=0, sample_tokens=8))
    one_step(model, handle)
    assert seen[0] == ((8, 32), (8, 64), 64, 2)
    assert handle.ffns[0].kept.tolist() == list(range(32))
    for bad, message in (
        (lambda unit: torch.ones(3), "shape \\(64,\\)"),
        (lambda unit: torch.full((64,), float("nan")), "not finite"),
    ):
        model, handle = sparse(paper(importance=bad, ladder=0))
        with pytest.raises(ConfigError, match=message):
            one_step(model, handle)


def test_sampling_draws_in_proportion_to_the_scores():
    scores = torch.tensor([1.0, 1.0, 1.0, 9.0])
    g = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(2000):
        counts[choose(scores, 1, selection="sample", generator=g)] += 1
    torch.testing.assert_close(counts / 2000, scores / 12, atol=0.03, rtol=0)


def test_sequence_scope_chooses_for_each_sequence_and_each_micro_batch():
    model, handle = sparse(paper(omit=0.5, scope="sequence", ladder=0))
    one_step(model, handle)
    first = handle.ffns[0].kept.clone()
    assert first.shape == (2, 32)
    assert not torch.equal(first[0], first[1])
    model(input_ids=batch(5), labels=batch(5)).loss.backward()
    assert not torch.equal(first, handle.ffns[0].kept)


def test_refresh_interval():
    model, handle = sparse(paper(omit=0.5, refresh_every=3, importance="uniform", ladder=0))
    chosen = []
    for step in range(6):
        one_step(model, handle, step)
        chosen.append(handle.ffns[0].kept.tolist())
    assert chosen[0] == chosen[1] == chosen[2] != chosen[3] == chosen[4] == chosen[5]


def test_backward_only_has_the_dense_loss_and_gradient_for_kept_channels_only():
    model, handle = sparse(paper(omit=0.5, omit_in="backward", ladder=0))
    stock = tiny_model("llama").train()
    loss = one_step(model, handle)
    dense = stock(input_ids=batch(), labels=batch()).loss
    assert loss == pytest.approx(float(dense.detach()), rel=1e-6)
    for ffn in handle.ffns:
        gradient = ffn.view.parameters_along_channels()[0].parameter.grad
        omitted = torch.ones(64, dtype=torch.bool)
        omitted[ffn.kept] = False
        assert torch.count_nonzero(gradient[omitted]) == 0
        assert torch.count_nonzero(gradient[~omitted]) > 0


def test_dense_loss_tokens_pass_through_every_channel():
    def losses(labels):
        model, handle = sparse(paper(omit=0.5, dense_tokens="loss", ladder=0))
        stock = tiny_model("llama").train()
        handle.before_step(0, 10)
        ids = batch()
        hidden = model(input_ids=ids, labels=labels).logits, stock(input_ids=ids).logits
        return (hidden[0] - hidden[1]).abs().amax(-1)

    all_bear_loss = batch().clone()
    difference = losses(all_bear_loss)
    assert difference[:, :-1].max() < 1e-5, "every token but the last bears loss, and attention is causal"
    late = batch().clone()
    late[:, :8] = -100
    difference = losses(late)
    assert difference[:, :7].min() > 1e-4, "prompt tokens are sparse"


def test_dense_loss_tokens_without_labels_is_refused():
    model, handle = sparse(paper(dense_tokens="loss", ladder=0))
    handle.before_step(0, 10)
    with pytest.raises(ConfigError, match="needs labels"):
        model(input_ids=batch())


def test_sensitivity_gives_the_harmful_layer_the_lower_rate():
    model = tiny_model("llama", num_hidden_layers=3).train()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e-3)
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    with torch.no_grad():  # labels the model itself predicts, so that any omission can only harm
        labels = torch.cat([batch()[:, :1], model(input_ids=batch()).logits.argmax(-1)[:, :-1]], 1)
    handle = fallow.sparsify(model, paper(omit=0.5, layer_rates="sensitivity", ladder=0))
    handle.before_step(0, 10)
    model(input_ids=batch(), labels=labels).loss.backward()
    rates = handle.layer_metrics()["omit_ffn"]
    assert rates[2] > rates[0]
    assert sum(rates) / 3 == pytest.approx(0.5, abs=0.05)


def test_late_and_given_rates():
    _, handle = sparse(paper(omit=0.4, layer_rates="late", ladder=0))
    assert handle.layer_metrics()["omit_ffn"] == pytest.approx([0.0, 0.8], abs=0.05)
    _, handle = sparse(paper(omit=0.4, layer_rates=[3.0, 1.0], ladder=0))
    assert handle.layer_metrics()["omit_ffn"] == pytest.approx([0.6, 0.2], abs=0.05)
    with pytest.raises(ConfigError, match="3 weights, the model 2 layers"):
        sparse(paper(layer_rates=[1.0, 1.0, 1.0]))


def test_ladder_ends_dense():
    model, handle = sparse(paper(omit=0.5, heads=0.5, ladder=2, dense_share=0.25))
    rates = []
    for step in range(8):
        one_step(model, handle, step, 8)
        rates.append(handle.metrics()["sat/omit_ffn"])
    assert rates[:4] == [0.5] * 4
    assert rates[4:6] == pytest.approx([0.25, 0.25])
    assert rates[6:] == [0.0, 0.0]


def test_lazy_state_freezes_omitted_rows_and_plain_adamw_does_not():
    def moved(lazy):
        model, handle = sparse(paper(omit=0.5, lazy=lazy, importance="uniform", refresh_every=1, ladder=0))
        optimizer = handle.optimizer(lr=1e-2, weight_decay=0.1)
        for step in range(2):
            before = model.model.layers[0].mlp.gate_proj.weight.detach().clone()
            one_step(model, handle, step)
            optimizer.step()
            optimizer.zero_grad()
        changed = (model.model.layers[0].mlp.gate_proj.weight.detach() != before).any(1)
        return changed, handle.ffns[0].kept

    changed, kept = moved(lazy=True)
    assert changed.nonzero().flatten().tolist() == kept.tolist()
    changed, _ = moved(lazy=False)
    assert changed.all(), "momentum and decay run on"


def test_fp32_plain_optimizer_equals_torch_adamw():
    model, handle = sparse(paper(omit=0.5, ladder=0))
    twin, handle2 = sparse(paper(omit=0.5, ladder=0))
    ours, theirs = (
        handle.optimizer(lr=1e-2),
        torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0),
    )
    for step in range(5):
        one_step(model, handle, step)
        one_step(twin, handle2, step)
        for o in (ours, theirs):
            o.step()
            o.zero_grad()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("config", "family", "message"),
    [
        (paper(heads=0.5, head_unit="query"), "gpt2", "head_unit='group'"),
        (paper(heads=0.5, layer_rates=[1.0]), "llama", "1 weights, the model 2 layers"),
    ],
)
def test_what_a_model_cannot_do_is_refused(config, family, message):
    with pytest.raises(ConfigError, match=message):
        sparse(config, family)


def test_metrics_count_selection_time():
    model, handle = sparse(paper(omit=0.5, heads=0.5, ladder=0))
    one_step(model, handle)
    metrics = handle.metrics()
    assert metrics["sat/selection_seconds"] > 0
    assert metrics["sat/omit_ffn"] == 0.5
    assert metrics["sat/omit_heads"] == 0.5
