"""Every method, every family: what any method of fallow must keep (docs/architecture.md, "The method contract")."""

from __future__ import annotations

import copy
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoModelForCausalLM

import fallow
from fallow.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.matrix.rows import EVERY, ROWS
from tests.tiny_models import FAMILIES, tiny_model


def batch(seed: int = 0, n: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 128, (n, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def grads(model):
    """Of a stock model, or of two wrapped ones of the same kind."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


PLAIN = ("arcee", "gpt_neox", "gpt2", "opt")


def sparse_model(row, family, config=None):
    model = tiny_model(family).train()
    try:
        return model, fallow.sparsify(model, config or row.config())
    except ConfigError as error:
        if "query" in row.name and "only query" in str(error):
            pytest.skip(f"{family} has no grouped queries")
        raise
    except UnsupportedModelError:
        if row.gated_only and family in PLAIN:
            pytest.skip(f"{family} has no gate")
        raise


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_zero_sparsity_is_the_stock_model(row, family):
    stock = tiny_model(family).train()
    model, handle = sparse_model(row, family, row.zero())
    handle.before_step(0, 10)
    for m in (stock, model):
        loss_of(m, batch()).backward()
    want, got = grads(stock), row.gradients(model)
    assert want.keys() == got.keys()
    for name in want:
        if row.exact_zero:
            assert torch.equal(want[name], got[name]), name
        else:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_step_equals_the_masked_reference(row, family):
    model, handle = sparse_model(row, family)
    stock = tiny_model(family).train()
    handle.before_step(0, 10)
    sparse_loss = loss_of(model, batch())
    sparse_loss.backward()
    with row.reference(handle, stock):
        reference_loss = loss_of(stock, batch())
        reference_loss.backward()
    torch.testing.assert_close(sparse_loss, reference_loss, rtol=1e-5, atol=1e-6)
    got, want = row.gradients(model), grads(stock)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    dense = tiny_model(family).train()
    dense_loss = loss_of(dense, batch())
    dense_loss.backward()
    differs = abs(float(dense_loss.detach() - sparse_loss.detach())) > 1e-4
    assert differs != row.exact_loss
    assert any(not torch.allclose(got[n], g, rtol=1e-2) for n, g in grads(dense).items()), "nothing was omitted"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_remove_gives_stock_weights_that_stock_from_pretrained_loads(row, family, tmp_path):
    model, handle = sparse_model(row, family)
    stock_modules = {n: type(m) for n, m in tiny_model(family).named_modules()}
    optimizer = handle.optimizer(lr=1e-2)
    for step in range(2):
        handle.before_step(step, 10)
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.after_step(step, 10)
    wrapped = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "wrapped")
    plain = handle.remove()
    assert {n: type(m) for n, m in plain.named_modules()} == stock_modules
    if row.sparse_weights:
        stored = plain.state_dict()
        assert sum(v.nbytes for v in wrapped.values()) < 0.75 * sum(v.nbytes for v in stored.values())
        assert not {k for k in wrapped if k.endswith("proj.weight")}, "no dense weight is kept"
    else:
        assert wrapped.keys() == plain.state_dict().keys()
    plain.save_pretrained(tmp_path / "plain")
    plain.eval()
    for folder in ("plain",) if row.sparse_weights else ("wrapped", "plain"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        torch.testing.assert_close(loaded(batch(9)).logits, plain(batch(9)).logits, rtol=0, atol=0)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_evaluation_is_dense_and_mode_switches(row):
    model, handle = sparse_model(row, "llama")
    dense = float(loss_of(tiny_model("llama").eval(), batch()).detach())
    handle.before_step(0, 10)
    sparse = float(loss_of(model, batch()).detach())
    handle.set_mode("dense")
    in_dense_mode = float(loss_of(model, batch()).detach())
    handle.set_mode("sparse")
    again = float(loss_of(model, batch()).detach())
    in_eval = float(loss_of(model.eval(), batch()).detach())
    if row.per_token:
        assert in_dense_mode == pytest.approx(dense, rel=1e-6)
        assert in_eval == pytest.approx(sparse, rel=1e-6)
    else:
        assert in_dense_mode == in_eval == (sparse if row.sparse_weights else dense)
    assert again == sparse
    assert (abs(sparse - dense) > 1e-4) != row.exact_loss
    with pytest.raises(ConfigError, match="'dense' or 'sparse'"):
        handle.set_mode("half")


@pytest.mark.parametrize("row", EVERY, ids=lambda r: r.name)
def test_resume_is_bit_exact(row):
    def steps(model, handle, optimizer, first, last):
        for step in range(first, last):
            handle.before_step(step, 8)
            loss_of(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.after_step(step, 8)

    model, handle = sparse_model(row, "llama")
    optimizer = handle.optimizer(lr=1e-2)
    steps(model, handle, optimizer, 0, 3)
    saved = copy.deepcopy((model.state_dict(), handle.state_dict(), optimizer.state_dict()))
    for value in saved[1].values():
        assert isinstance(value, torch.Tensor | str | int | float | bool | None)
    steps(model, handle, optimizer, 3, 8)

    resumed, handle2 = sparse_model(row, "llama")
    optimizer2 = handle2.optimizer(lr=1e-2)
    resumed.load_state_dict(saved[0])
    handle2.load_state_dict(saved[1])
    optimizer2.load_state_dict(saved[2])
    steps(resumed, handle2, optimizer2, 3, 8)
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(resumed.named_parameters())[name]), name


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_state_of_another_model_is_refused(row):
    _model, handle = sparse_model(row, "llama")
    state = handle.state_dict() | {"n_layers": 77}
    with pytest.raises(CheckpointError, match="77 layers"):
        handle.load_state_dict(state)


@pytest.mark.parametrize("row", EVERY, ids=lambda r: r.name)
def test_gradient_checkpointing_replays_the_same_selection(row):
    plain, handle = sparse_model(row, "llama")
    checked, handle2 = sparse_model(row, "llama")
    checked.gradient_checkpointing_enable({"use_reentrant": False})
    for m, h in ((plain, handle), (checked, handle2)):
        h.before_step(0, 10)
        loss_of(m, batch()).backward()
    want, got = grads(plain), grads(checked)
    assert all(torch.allclose(want[n], got[n], rtol=1e-5, atol=1e-7) for n in want)


@pytest.mark.parametrize("row", EVERY, ids=lambda r: r.name)
def test_accumulation_keeps_one_selection_for_the_step(row):
    model, handle = sparse_model(row, "llama")
    handle.before_step(0, 10)
    kept = []
    for micro in range(3):
        (loss_of(model, batch(micro)) / 3).backward()
        kept.append(row.choice(handle))
    assert all(torch.equal(a, b) for later in kept[1:] for a, b in zip(kept[0], later, strict=True))
    if row.sparse_weights or row.per_token:
        assert all(p.grad.shape == p.shape for p in model.parameters())
        return
    for ffn in handle.ffns:
        omitted = torch.ones(ffn.view.n_channels, dtype=torch.bool)
        omitted[ffn.kept] = False
        gradient = ffn.view.parameters_along_channels()[0].parameter.grad
        assert torch.count_nonzero(gradient[omitted]) == 0


@pytest.mark.parametrize("row", EVERY, ids=lambda r: r.name)
def test_torch_compile_runs_and_agrees(row):
    torch._dynamo.reset()
    eager, handle = sparse_model(row, "llama")
    compiled, handle2 = sparse_model(row, "llama")
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager")
    for step in range(3):
        for m, h in ((eager, handle), (compiled, handle2)):
            h.before_step(step, 10)
            m.zero_grad()
            loss_of(m, batch(step)).backward()
        want, got = grads(eager), grads(compiled)
        for n in want:
            torch.testing.assert_close(got[n], want[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_sparsify_twice_is_refused(row):
    model, _ = sparse_model(row, "llama")
    with pytest.raises(ConfigError, match="remove"):
        fallow.sparsify(model, row.config())
