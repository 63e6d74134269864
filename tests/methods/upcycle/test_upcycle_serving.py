"""An upcycled model that answers: one token at a time as all at once, its prompt, and the layout of its weights."""

from __future__ import annotations

import pytest
import torch
from tests.methods.upcycle.upcycled_models import loss_of, upcycled
from tests.tiny_models import tiny_batch, tiny_model

import fallow
from fallow.errors import ConfigError


@pytest.mark.parametrize("predictor", ["linear", "bilinear", "quantized"])
def test_served_tokens_equal_the_masked_forward(predictor):
    """One token at a time with a cache (the op) against all at once (dense GEMMs and a mask)."""
    model, handle = upcycled(predictor=predictor, rank=8 if predictor != "quantized" else None)
    handle.watch(tiny_batch(seed=3))
    handle.set_mode("sparse")
    model.eval()
    ids = tiny_batch(tokens=10, batch=1)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        past, steps = None, []
        for t in range(10):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=past, use_cache=True)
            past, _ = out.past_key_values, steps.append(out.logits)
    # a quantized predictor rounds x to 8 bits when it serves, and may break a near-tie otherwise
    tolerance = 0.3 if predictor == "quantized" else 1e-4
    assert float((torch.cat(steps, 1) - whole).abs().mean()) < tolerance * float(whole.std())


def test_generate_runs_sparse_and_differs_from_dense():
    model, handle = upcycled()
    model.eval()
    ids = tiny_batch(tokens=6, batch=1)["input_ids"]
    handle.set_mode("sparse")
    sparse = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    handle.set_mode("dense")
    dense = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    stock = tiny_model("llama").eval().generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    assert torch.equal(dense, stock)
    assert not torch.equal(sparse, dense)


def test_a_prompt_may_be_read_by_all_channels():
    """The first token after a dense prompt is the dense model's; a loss, which fills no cache, stays sparse."""
    model, handle = upcycled(prompts="dense")
    model.eval()
    ids = tiny_batch(tokens=6, batch=1)["input_ids"]
    handle.set_mode("sparse")

    def answers():
        how = {"do_sample": False, "use_cache": True, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(ids, max_new_tokens=8, **how)
        return torch.stack(out.logits)

    found, loss = answers(), float(loss_of(model).detach())
    handle.prompts = "sparse"
    assert float(loss_of(model).detach()) == loss
    sparse = answers()
    handle.set_mode("dense")
    dense = answers()
    torch.testing.assert_close(found[0], dense[0])
    assert not torch.allclose(found[0], sparse[0], atol=1e-4)
    assert not torch.allclose(found[1], dense[1], atol=1e-4), "what follows is sparse"
    with pytest.raises(ConfigError, match="prompts"):
        fallow.Upcycle(prompts="half")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_was_laid_out_for_decoding_is_saved_trained_and_handed_back_like_any_model(family, tmp_path):
    model, handle = upcycled(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle.set_mode("sparse")
    model.eval()
    model.generate(tiny_batch(tokens=6, batch=1)["input_ids"], max_new_tokens=3, do_sample=False)
    weights = [where.parameter for layer in handle.layers for where in layer.view.parameters_along_channels()]
    assert not all(p.is_contiguous() for p in weights), "the layout under test was not made"
    storages = len({p.untyped_storage().data_ptr() for p in weights})
    assert storages == (len(handle.layers) if family == "llama" else len(weights)), "three matrices are one run of rows"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, before[name]) and torch.equal(p, model.get_parameter(name)), name

    model.train()
    handle.before_step(0, 2)
    assert all(p.is_contiguous() for p in weights)
    assert len({p.untyped_storage().data_ptr() for p in weights}) == len(weights), "each owns its storage"
    loss_of(model).backward()
    handle.after_step(0, 2)
    model.zero_grad()

    model.eval()
    model.generate(tiny_batch(tokens=6, batch=1)["input_ids"], max_new_tokens=3, do_sample=False)
    assert all(torch.equal(p, before[name]) and p.is_contiguous() for name, p in handle.remove().named_parameters())
