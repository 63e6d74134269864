"""ops/cross_entropy: both backends against F.cross_entropy in fp32, and as a transformers model's loss function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import tiny_batch, tiny_model
from transformers.loss.loss_utils import ForCausalLMLoss

from fallow.errors import ConfigError
from fallow.ops import cross_entropy

BACKENDS = [
    pytest.param(b, id=b.name, marks=pytest.mark.skipif(not b.available()[0], reason=b.available()[1]))
    for b in cross_entropy.BACKENDS
]


def _rows(n, vocabulary, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, vocabulary, generator=generator) * 5).to(dtype)
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    labels[::3] = -100
    return logits, labels


def _reference(logits, labels):
    logits = logits.detach().float().clone().requires_grad_()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    return loss.item(), logits.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"])
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 20), vocabulary=st.integers(1, 300))
def test_matches_torch(backend, dtype, tolerance, n, vocabulary):
    logits, labels = _rows(n, vocabulary, dtype, seed=n)
    expected_loss, expected_grad = _reference(logits, labels)
    lse, loss = backend.forward(logits, labels, -100)
    assert loss.sum().item() == pytest.approx(expected_loss, rel=1e-5, abs=1e-4)
    grad = backend.backward(logits, labels, lse, torch.tensor(0.5), -100)
    assert grad.dtype == dtype
    # one rounding to the dtype: relative to each element, with a floor for the subnormal tail of the softmax
    assert ((grad.float() - 0.5 * expected_grad).abs() <= tolerance * expected_grad.abs() + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend):
    logits = torch.tensor([[3e4, -3e4, 0.0] + [-1e3] * 97, [-float("inf"), 1.0, 2.0] + [0.5] * 97])
    labels = torch.tensor([2, 1])
    expected_loss, expected_grad = _reference(logits, labels)
    lse, loss = backend.forward(logits, labels, -100)
    assert loss.sum().item() == pytest.approx(expected_loss, rel=1e-6)
    assert torch.allclose(backend.backward(logits, labels, lse, torch.tensor(1.0), -100), expected_grad, atol=1e-6)
    _, loss = backend.forward(logits.index_fill(1, torch.tensor([50]), float("nan")), labels, -100)
    assert loss.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend):
    logits, labels = _rows(9, 130, torch.float32)
    logits[labels == -100] = float("nan")
    lse, loss = backend.forward(logits, labels, -100)
    grad = backend.backward(logits, labels, lse, torch.tensor(1.0), -100)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all() and grad[labels == -100].abs().max() == 0


def test_strided_logits_and_survival_of_the_logits():
    wide, labels = _rows(8, 256, torch.bfloat16)
    logits = wide[:, :200].detach().requires_grad_()
    labels = labels.clamp(max=199)
    before = logits.detach().clone()
    loss = cross_entropy.cross_entropy(logits, labels)
    loss.backward()
    expected_loss, expected = _reference(before, labels)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert torch.allclose(logits.grad.float(), expected, rtol=2**-8, atol=1e-6)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_same_as_transformers(items, shifted):
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 50)
    labels = torch.randint(0, 50, (2, 6))
    labels[0, :3] = -100
    arguments = {"num_items_in_batch": items, "shift_labels": labels if shifted else None}
    ours, stock = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = cross_entropy.causal_lm_loss(ours, labels, 50, **arguments)
    expected = ForCausalLMLoss(stock, labels, 50, **arguments)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours.grad, stock.grad, atol=1e-7)


def test_as_a_models_loss_function_and_compiled():
    model, batch = tiny_model("llama"), tiny_batch()
    expected = model(**batch).loss
    expected.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.loss_function = cross_entropy.causal_lm_loss
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = call(**batch).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert all(torch.allclose(p.grad, grads[n], rtol=1e-4, atol=1e-6) for n, p in model.named_parameters())


def test_all_labels_ignored_is_nan_as_in_torch():
    assert cross_entropy.causal_lm_loss(torch.randn(1, 3, 5), torch.full((1, 3), -100), 5).isnan()


def test_bad_input():
    with pytest.raises(ConfigError, match="vocabulary of 5"):
        cross_entropy.cross_entropy(torch.randn(2, 5), torch.tensor([1, 5]))
    with pytest.raises(ConfigError, match="vocabulary of 5"):
        cross_entropy.cross_entropy(torch.randn(2, 5), torch.tensor([1, -1]))
    with pytest.raises(ConfigError, match="wanted"):
        cross_entropy.cross_entropy(torch.randn(2, 5), torch.tensor([1, 2, 3]))
    with pytest.raises(ConfigError, match="shift_labels"):
        cross_entropy.causal_lm_loss(torch.randn(1, 2, 5), None, 5)
