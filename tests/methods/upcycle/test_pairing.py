"""teacher="self": one pass over the doubled batch is the dense loss, and the sparse mode's divergence from it."""

from __future__ import annotations

import pytest
import torch
from tests.methods.upcycle.upcycled_models import upcycled
from tests.tiny_models import tiny_batch

from fallow.errors import ConfigError
from fallow.ops.divergence import divergence

SELF = {"distill": 1.0, "teacher": "self"}


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("distill", [1.0, 0.6])
def test_it_is_both_losses_and_the_sum_of_their_gradients(distill):
    batch = tiny_batch()
    model, handle = upcycled(**SELF | {"distill": distill}, compensation=4)
    model.train()
    handle.before_step(0, 2)
    out = model(**batch)
    out.loss.backward()
    together = gradients(model)

    apart, other = upcycled(compensation=4)
    apart.train()
    with other.in_mode("dense"):
        dense = apart(**batch)
    dense.loss.backward()
    sparse = apart(**batch)
    kl = divergence(sparse.logits.flatten(0, 1), dense.logits.detach().flatten(0, 1)) / batch["input_ids"].numel()
    (distill * kl + (1 - distill) * sparse.loss).backward()
    torch.testing.assert_close(out.loss, dense.loss + distill * kl + (1 - distill) * sparse.loss)
    torch.testing.assert_close(out.logits, sparse.logits)
    assert float(kl.detach()) > 1e-3, "the modes differ"
    wanted = gradients(apart)
    assert wanted.keys() == together.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model, _ = upcycled(**SELF, hidden_loss=0.5)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**tiny_batch()).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_micro_batches_count_by_their_tokens():
    """Half of the step's tokens: half of every loss."""
    batch = tiny_batch()
    model, _ = upcycled(**SELF)
    model.train()
    whole = model(**batch).loss.detach()
    count = (batch["labels"][..., 1:] != -100).sum() * 2
    assert float(model(**batch, num_items_in_batch=count).loss.detach()) == pytest.approx(float(whole) / 2, rel=1e-4)


def test_both_modes_learn():
    batch = tiny_batch()
    model, handle = upcycled(**SELF)
    optimizer = handle.optimizer(lr=3e-3)
    before = {mode: loss_in(model, handle, mode, batch) for mode in ("dense", "sparse")}
    model.train()
    for step in range(8):
        handle.before_step(step, 8)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.after_step(step, 8)
    for mode, was in before.items():
        assert loss_in(model, handle, mode, batch) < was - 0.05, mode


@torch.no_grad()
def loss_in(model, handle, mode, batch):
    model.eval()
    with handle.in_mode(mode):
        return float(model(**batch).loss)


def test_outside_of_training_nothing_is_doubled():
    batch = tiny_batch()
    model, _ = upcycled(**SELF)
    plain, _ = upcycled()
    model.train()
    model(**batch).loss.backward()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain.eval()(**batch).logits)


def test_inputs_that_cannot_be_doubled_are_named():
    model, _ = upcycled(**SELF)
    model.train()
    with pytest.raises(ConfigError, match="'inputs_embeds'"):
        model(inputs_embeds=torch.zeros(1, 4, model.config.hidden_size), labels=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ConfigError, match="set distill above 0"):
        upcycled(teacher="self")
