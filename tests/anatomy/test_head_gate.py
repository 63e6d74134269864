"""Head gates on every family: dense identity, omitted heads against the masked stock model, and clean removal."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fallow import anatomy
from fallow.errors import ConfigError
from tiny_models import FAMILIES, tiny_batch, tiny_model

MHA = ("gpt_neox", "gpt2", "opt")
GROUPED = tuple(f for f in FAMILIES if f not in MHA)
# transformers has no SDPA for Gemma 2, whose attention logits are soft-capped.
KERNELS = [(f, k) for f in FAMILIES for k in ("eager", "sdpa") if (f, k) != ("gemma2", "sdpa")]


def run(model, batch):
    """Logits and every gradient by name, of a fresh backward."""
    model.zero_grad(set_to_none=True)
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def masked_run(model, batch, kept_per_layer):
    """The truth: the stock model with the omitted heads' columns of the output projection's input set to zero."""
    handles = []
    for view, kept in zip(anatomy.inspect(model).attentions, kept_per_layer, strict=True):
        mask = torch.zeros(view.n_heads).index_fill(0, kept, 1.0).repeat_interleave(view.head_dim)
        output = model.get_submodule(f"{view.name}.{view.o_placement[0]}")
        handles.append(output.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask.to(args[0].dtype),)))
    result = run(model, batch)
    for handle in handles:
        handle.remove()
    return result


def close(got, expected, tol=2e-6):
    assert got[1].keys() == expected[1].keys()
    for name, a, b in [("logits", got[0], expected[0])] + [(n, got[1][n], expected[1][n]) for n in expected[1]]:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=tol, msg=lambda m, name=name: f"{name}: {m}")


def heads_of(view, kv_kept, within):
    """Sorted (q_heads, kv_heads): of each kept KV head, the query heads numbered `within`."""
    ratio = view.n_heads // view.n_kv_heads
    kv = torch.tensor(kv_kept)
    return (kv[:, None] * ratio + torch.tensor(within)).flatten(), kv


def check_against_masked(model, choices, tol=2e-6):
    """`choices[layer] = (q_heads, kv_heads)`; also that gradients of omitted heads are exactly zero."""
    batch = tiny_batch()
    expected = masked_run(model, batch, [q for q, _ in choices])
    dense = run(model, batch)
    views = anatomy.inspect(model).attentions
    for view, (q, kv) in zip(views, choices, strict=True):
        gate = view.install()
        gate.configure(len(q), len(kv))
        gate.select(q, kv)
    got = run(model, batch)
    close(got, expected, tol)
    assert (got[0] - dense[0]).abs().max() > 1e-3
    for view, (q, kv) in zip(views, choices, strict=True):
        for p in view.parameters_along_heads():
            rows = p.rows(q, kv)
            left_out = torch.ones(p.parameter.shape[p.dim], dtype=torch.bool).index_fill(0, rows, False)
            grad = got[1][p.name].movedim(p.dim, 0)
            assert rows.diff().gt(0).all() and grad[left_out].abs().sum() == 0, p.name
            assert grad[rows].abs().sum() > 0, p.name
    for view in views:
        view.uninstall()
    assert torch.equal(run(model, batch)[0], dense[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_views_describe_the_attention(family):
    model = tiny_model(family)
    parameters = dict(model.named_parameters())
    for view in anatomy.inspect(model).attentions:
        assert (view.n_heads, view.n_kv_heads) == (4, 4 if family in MHA else 2)
        assert view.head_dim == (16 if family in ("qwen3", "gemma2", "gemma3") else 8)
        assert view.v_weight().shape == (view.n_kv_heads * view.head_dim, 32)
        assert view.o_weight().shape == (32, view.n_heads * view.head_dim)
        everything = torch.arange(view.n_heads), torch.arange(view.n_kv_heads)
        for p in view.parameters_along_heads():
            assert parameters[p.name] is p.parameter
            assert torch.equal(p.rows(*everything), torch.arange(p.parameter.shape[p.dim])), p.name


@pytest.mark.parametrize("family", FAMILIES)
def test_installed_dense_is_the_stock_model_bit_for_bit(family):
    model, batch = tiny_model(family), tiny_batch()
    logits, grads = run(model, batch)
    for view in anatomy.inspect(model).attentions:
        view.install()
    got, got_grads = run(model, batch)
    assert torch.equal(got, logits)
    assert got_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert torch.equal(got_grads[name], grad), name


@pytest.mark.parametrize(("family", "attention"), KERNELS)
def test_omitted_kv_groups_equal_the_masked_model(family, attention):
    model = tiny_model(family, attn_implementation=attention)
    views = anatomy.inspect(model).attentions
    within = list(range(views[0].n_heads // views[0].n_kv_heads))
    kept = [[1, 3], [0]] if family in MHA else [[1], [0]]
    check_against_masked(model, [heads_of(v, k, within) for v, k in zip(views, kept, strict=True)])


@pytest.mark.parametrize(("family", "attention"), [k for k in KERNELS if k[0] in GROUPED])
def test_omitted_query_heads_of_each_group_equal_the_masked_model(family, attention):
    model = tiny_model(family, attn_implementation=attention)
    views = anatomy.inspect(model).attentions
    check_against_masked(model, [heads_of(v, [0, 1], [1 - i]) for i, v in enumerate(views)])


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2"])
def test_fewer_groups_and_fewer_query_heads_in_each_at_once(family):
    model = tiny_model(family, num_attention_heads=12, num_key_value_heads=3, hidden_size=48)
    views = anatomy.inspect(model).attentions
    choices = [
        (torch.tensor([0, 3, 9, 10]), torch.tensor([0, 2])),
        (torch.tensor([4, 5, 6, 8, 10, 11]), torch.tensor([1, 2])),
    ]
    assert (views[0].n_heads, views[0].n_kv_heads) == (12, 3)
    check_against_masked(model, choices)


def test_a_registered_attention_function_sees_the_smaller_attention():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def recorded(module, query, key, value, attention_mask, **settings):
        seen.append((query.shape[1], key.shape[1], module.num_key_value_groups))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)

    AttentionInterface.register("recorded", recorded)
    model = tiny_model("llama", attn_implementation="recorded")
    gate = anatomy.inspect(model).attentions[1].install()
    gate.configure(2, 2)
    gate.select(torch.tensor([0, 3]), torch.tensor([0, 1]))
    batch = tiny_batch()
    model(input_ids=batch["input_ids"])
    assert seen == [(4, 2, 2), (2, 2, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_heads_equal_the_masked_model(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    views = anatomy.inspect(model).attentions
    within = list(range(views[0].n_heads // views[0].n_kv_heads))
    check_against_masked(model, [heads_of(v, [0], within) for v in views], tol=3e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_input_comes_first_sees_the_input_and_may_select(family):
    model, batch = tiny_model(family), tiny_batch()
    view = anatomy.inspect(model).attentions[0]
    q, kv = heads_of(view, [1], list(range(view.n_heads // view.n_kv_heads)))
    everything = torch.arange(view.n_heads)
    expected = masked_run(model, batch, [q, everything])
    inputs, seen = [], []
    model.get_submodule(view.name).register_forward_pre_hook(
        lambda m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    gate = view.install()
    gate.configure(len(q), len(kv))

    def choose(x_BTD):
        seen.append(x_BTD)
        gate.select(q, kv)

    gate.on_input = choose
    close(run(model, batch), expected)
    assert len(seen) == 1 and torch.equal(seen[0], inputs[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_names_files_attributes_and_removal(family, tmp_path):
    model, batch = tiny_model(family), tiny_batch()
    logits, _ = run(model, batch)
    modules = {n: id(m) for n, m in model.named_modules()}
    keys, parameters = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    views = anatomy.inspect(model).attentions
    attributes = [dict(v.module.__dict__) for v in views]
    config = model.config.to_dict()
    gates = [v.install() for v in views]
    for view, gate in zip(views, gates, strict=True):
        ratio = view.n_heads // view.n_kv_heads
        gate.configure(ratio, 1)
        gate.select(*heads_of(view, [1], list(range(ratio))))
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert model.config.to_dict() == config
    assert not torch.equal(model(**batch).logits, logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert torch.equal(loaded(**batch).logits, logits)
    for gate in gates:
        gate.configure(None, None)
    assert torch.equal(model(**batch).logits, logits)
    assert [dict(v.module.__dict__) for v in views] == attributes
    gates[0].configure(1, 1)
    for view in views:
        view.uninstall()
        view.uninstall()
    assert [dict(v.module.__dict__) for v in views] == attributes
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert torch.equal(model(**batch).logits, logits)


def test_other_layers_keep_all_heads_when_one_is_configured():
    """Phi-3 reads the number of heads from the config, which all layers share."""
    model, batch = tiny_model("phi3"), tiny_batch()
    views = anatomy.inspect(model).attentions
    expected = masked_run(model, batch, [torch.tensor([2, 3]), torch.arange(4)])
    gate = views[0].install()
    views[1].install()
    gate.configure(2, 1)
    gate.select(torch.tensor([2, 3]), torch.tensor([1]))
    close(run(model, batch), expected)
    assert views[1].module.config is model.config


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_compiled_step_equals_eager(family):
    model, batch = tiny_model(family), tiny_batch()
    views = anatomy.inspect(model).attentions
    for view in views:
        ratio = view.n_heads // view.n_kv_heads
        gate = view.install()
        gate.configure(ratio, 1)
        gate.select(*heads_of(view, [1], list(range(ratio))))
    expected = run(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    out = compiled(**batch)
    out.loss.backward()
    close((out.logits.detach(), {n: p.grad for n, p in model.named_parameters()}), expected)


def test_gradient_checkpointing_with_omitted_heads():
    model, batch = tiny_model("llama"), tiny_batch()
    kept = torch.tensor([0, 1]), torch.tensor([0])
    expected = masked_run(model, batch, [kept[0], kept[0]])
    for view in anatomy.inspect(model).attentions:
        gate = view.install()
        gate.configure(2, 1)
        gate.select(*kept)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    close(run(model, batch), expected)


def test_bad_use_names_the_mend():
    model, batch = tiny_model("llama"), tiny_batch()
    view = anatomy.inspect(model).attentions[0]
    gate = view.install()
    with pytest.raises(ConfigError, match="has a head gate already; call uninstall"):
        view.install()
    with pytest.raises(ConfigError, match="configured dense; call configure"):
        gate.select(torch.tensor([0]), torch.tensor([0]))
    for n_q, n_kv in [(0, 0), (3, 2), (4, 1), (6, 3), (2, 0), (-2, -1)]:
        with pytest.raises(ConfigError, match="keep 1 to 2 KV heads and the same number, 1 to 2, of query heads"):
            gate.configure(n_q, n_kv)
    with pytest.raises(ConfigError, match="give both"):
        gate.configure(2, None)
    gate.configure(2, 1)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn: .*none are selected; call select"):
        model(**batch)
    with pytest.raises(ConfigError, match=r"selected 1 query and 1 KV heads, configured \(2, 1\)"):
        gate.select(torch.tensor([0]), torch.tensor([0]))
    for q, kv in [([0, 1], [1]), ([3, 2], [1]), ([1, 2], [0]), ([2, 2], [1]), ([4, 5], [2])]:
        with pytest.raises(ConfigError, match=r"must be sorted, distinct and in range, with 2 query heads"):
            gate.select(torch.tensor(q), torch.tensor(kv))
