"""FFN views on every family: identity when installed, live weights, parameters along channels, and clean removal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fallow import anatomy
from fallow.errors import ConfigError, UnsupportedModelError
from tiny_models import FAMILIES, N_CHANNELS, tiny_batch, tiny_model

ACT = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}
EXPECTED_ACT = {
    "gemma2": "gelu_tanh",
    "gemma3": "gelu_tanh",
    "gpt2": "gelu_tanh",
    "gpt_neox": "gelu",
    "opt": "relu",
    "arcee": "relu2",
}


def run(model, batch):
    """Logits and every gradient by name, of a fresh backward."""
    model.zero_grad(set_to_none=True)
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain_forward(view, kept=None):
    """The FFN in plain torch from live weights; `kept` [K] leaves the other channels out."""

    def forward(x_BTD):
        assert x_BTD.dim() == 3
        w = view.weights()
        act = ACT[view.act]
        up = F.linear(x_BTD, w.w_up_FD, w.b_up_F)
        h = act(up) if w.w_gate_FD is None else act(F.linear(x_BTD, w.w_gate_FD, w.b_gate_F)) * up
        if kept is not None:
            h = h * torch.zeros(view.n_channels).index_fill(0, kept, 1.0)
        return F.linear(h, w.w_down_DF, w.b_down_D)

    return forward


def assert_same(got, expected, *, exact):
    (logits, grads), (logits0, grads0) = got, expected
    assert grads.keys() == grads0.keys()
    for name, a, b in [("logits", logits, logits0)] + [(n, grads[n], grads0[n]) for n in grads0]:
        if exact:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_views_describe_the_model(family):
    model = tiny_model(family)
    found = anatomy.inspect(model)
    parameters = dict(model.named_parameters())
    assert (found.n_layers, len(found.ffns), len(found.attentions), found.d_model) == (2, 2, 2, 32)
    assert len(found.layers) == 2
    for i, view in enumerate(found.ffns):
        assert (view.layer, view.n_channels, view.d_model) == (i, N_CHANNELS, 32)
        assert view.act == EXPECTED_ACT.get(family, "silu")
        assert view.kind == ("plain" if family in ("gpt2", "gpt_neox", "opt", "arcee") else "gated")
        assert model.get_submodule(view.name) is not None
        along = view.parameters_along_channels()
        for name, parameter, dim, segments in along:
            assert parameters[name] is parameter
            assert parameter.shape[dim] == segments * N_CHANNELS
        n_biases = sum(b is not None for b in view.weights()[3:5])
        assert len(along) == (2 if family in ("phi3", "gpt2", "gpt_neox", "opt", "arcee") else 3) + n_biases
    for linear in found.linears:
        assert linear.weight().shape == (linear.n_out, linear.n_in)
        assert f"{linear.name}.weight" in parameters
    inside = sum(p.numel() for n, p in parameters.items() if any(n == f"{v.name}.weight" for v in found.linears))
    assert inside == sum(v.n_in * v.n_out for v in found.linears) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_installed_dense_is_the_stock_model_bit_for_bit(family):
    model, batch = tiny_model(family), tiny_batch()
    expected = run(model, batch)
    for view in anatomy.inspect(model).ffns:
        view.install(view.dense)
    assert_same(run(model, batch), expected, exact=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_torch_from_the_live_weights_is_the_stock_model(family):
    model, batch = tiny_model(family), tiny_batch()
    expected = run(model, batch)
    for view in anatomy.inspect(model).ffns:
        view.install(plain_forward(view))
    assert_same(run(model, batch), expected, exact=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_omitted_channels_lie_where_the_view_says(family):
    model, batch = tiny_model(family), tiny_batch()
    kept = torch.arange(0, N_CHANNELS, 3)
    left_out = torch.tensor([c for c in range(N_CHANNELS) if c not in kept.tolist()])
    dense = run(model, batch)
    views = anatomy.inspect(model).ffns
    for view in views:
        view.install(plain_forward(view, kept))
    logits, grads = run(model, batch)
    assert (logits - dense[0]).abs().max() > 1e-3
    for view in views:
        for name, _, dim, segments in view.parameters_along_channels():
            for s in range(segments):
                assert grads[name].index_select(dim, left_out + s * N_CHANNELS).abs().max() == 0, name
                grad = grads[name].index_select(dim, kept + s * N_CHANNELS)
                assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_files_and_removal(family, tmp_path):
    model, batch = tiny_model(family), tiny_batch()
    logits, _ = run(model, batch)
    modules = {n: id(m) for n, m in model.named_modules()}
    keys, parameters = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    views = anatomy.inspect(model).ffns
    for view in views:
        view.install(plain_forward(view))
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert torch.equal(loaded(**batch).logits, logits)
    model.eval()
    for view in views:
        view.uninstall()
        view.uninstall()
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert not any(m.training for m in model.modules())
    assert torch.equal(model.train()(**batch).logits, logits)
    assert not any(layer._forward_pre_hooks for layer in anatomy.inspect(model).layers)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_after_the_ffn_stays(family):
    name = "resid_pdrop" if family == "gpt2" else "dropout"
    model, batch = tiny_model(family, **{name: 0.5}), tiny_batch()
    torch.manual_seed(1)
    expected = run(model, batch)
    for view in anatomy.inspect(model).ffns:
        view.install(view.dense)
    torch.manual_seed(1)
    assert_same(run(model, batch), expected, exact=True)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gradient_checkpointing_calls_the_installed_forward_again(family):
    model, batch = tiny_model(family), tiny_batch()
    expected = run(model, batch)
    calls = []

    def counted(view):
        forward = plain_forward(view)
        return lambda x: calls.append(view.layer) or forward(x)

    for view in anatomy.inspect(model).ffns:
        view.install(counted(view))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model, batch), expected, exact=False)
    assert sorted(calls) == [0, 0, 1, 1]


def test_weights_written_later_are_seen_whichever_module_they_were_written_to():
    model = tiny_model("llama")
    view = anatomy.inspect(model).ffns[0]
    stock = model.model.layers[0].mlp
    view.install(view.dense)
    fresh = torch.nn.Parameter(torch.ones_like(stock.gate_proj.weight))
    model.model.layers[0].mlp.gate_proj.weight = fresh
    assert view.weights().w_gate_FD is fresh and stock.gate_proj.weight is fresh
    replacement = torch.nn.Linear(32, N_CHANNELS, bias=False)
    model.model.layers[0].mlp.up_proj = replacement
    view.uninstall()
    assert model.model.layers[0].mlp is stock and stock.up_proj is replacement


def test_hooks_on_the_stock_module_still_fire():
    model, seen = tiny_model("llama"), []
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    view = anatomy.inspect(model).ffns[0]
    view.install(view.dense)
    model(**tiny_batch())
    assert seen == [(2, 12, 32)]


def test_a_module_as_forward_is_not_registered():
    model = tiny_model("llama")
    keys = list(model.state_dict())
    anatomy.inspect(model).ffns[0].install(torch.nn.Linear(32, 32))
    assert list(model.state_dict()) == keys


def test_bad_use_names_the_mend():
    model = tiny_model("llama")
    view = anatomy.inspect(model).ffns[0]
    view.install(view.dense)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp has a forward installed already; call uninstall"):
        view.install(view.dense)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp is a _FFNSlot .*call remove"):
        anatomy.inspect(model)
    view.uninstall()
    model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp has a forward of its own"):
        view.install(view.dense)


def test_unknown_activation_is_an_error():
    with pytest.raises(UnsupportedModelError, match=r"act_fn is a Tanh; fallow computes silu"):
        anatomy.inspect(tiny_model("llama", hidden_act="tanh"))
