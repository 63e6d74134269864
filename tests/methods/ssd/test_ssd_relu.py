"""Models without zeros: refused, or with ReLU put in for good; and other settings that do not fit the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.ssd.steps import batch, evaluated, made
from tests.tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import fallow
from fallow import SSD
from fallow.errors import ConfigError


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_relu_is_put_in_and_saved(family, tmp_path):
    model: Any = tiny_model(family)
    smooth = evaluated(model)
    with pytest.raises(ConfigError, match="relu='swap'"):
        fallow.sparsify(model, SSD(experts=4, active=2))
    assert torch.equal(evaluated(model), smooth) and getattr(model, "_fallow", None) is None
    handle: Any = fallow.sparsify(model, SSD(experts=4, active=2, relu="swap"))
    swapped = evaluated(model)
    assert float((swapped - smooth).abs().max()) > 1e-3
    assert {layer.view.act for layer in handle.layers} == {"relu"}
    handle.watch({"input_ids": batch(99)})
    assert 0.2 < handle.observe(0).zeros < 0.8
    handle.remove().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(evaluated(loaded), swapped, rtol=0, atol=0)
    fallow.sparsify(loaded, SSD(experts=4, active=2))


def test_swap_leaves_a_model_alone_that_has_zeros():
    model, handle = made("arcee", relu="swap")
    assert {layer.view.act for layer in handle.layers} == {"relu2"} and model.config.hidden_act == "relu2"
    assert torch.equal(evaluated(model), evaluated(tiny_model("arcee")))


def test_what_does_not_fit_is_refused_in_one_line():
    model = tiny_model("llama", hidden_act="relu")
    with pytest.raises(ConfigError, match=r"experts=24 does not divide the 64 channels.*use 8, 16, 32$") as caught:
        fallow.sparsify(model, SSD(experts=24, active=4))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="active=5 must be a whole number between 1 and experts=4"):
        SSD(experts=4, active=5)
    with pytest.raises(ConfigError, match="active has 3 numbers, the model 2 layers"):
        fallow.sparsify(model, SSD(experts=4, active=(1, 2, 3)))
    wrong = SSD(experts=4, active=2, schedule="always_sparse", partition=lambda f, e, g: torch.zeros(len(f)).long())
    handle = fallow.sparsify(model, wrong)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="each 16 times"):
        handle.before_step(0, 10)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
