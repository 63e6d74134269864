"""`inspect` on what it does not know: the error names what was looked for; and on base models and changed ones."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fallow import anatomy
from fallow.errors import UnsupportedModelError
from tiny_models import FAMILIES, tiny_model


def test_unknown_family_lists_what_was_looked_for():
    config = CONFIG_MAPPING["bloom"](hidden_size=32, n_layer=1, n_head=4, vocab_size=64)
    with pytest.raises(UnsupportedModelError) as error:
        anatomy.inspect(AutoModelForCausalLM.from_config(config))
    text = str(error.value)
    assert "\n" not in text and "model_type 'bloom' (BloomForCausalLM)" in text
    for path in ("model.layers.0", "transformer.h.0", "gpt_neox.layers.0", "model.decoder.layers.0"):
        assert path in text
    for part in ("mlp.gate_proj", "mlp.gate_up_proj", "mlp.dense_h_to_4h", "mlp.c_fc", "fc1", "self_attn.q_proj"):
        assert part in text
    for family in anatomy.FAMILIES:
        assert family in text
    assert "gpt2: transformer.h.0" in text and "lacks mlp.c_fc" in text and "families.py" in text


def test_unknown_family_that_looks_like_a_known_one_is_told_so_and_still_refused():
    model = tiny_model("llama")
    model.config.model_type = "lama"
    with pytest.raises(UnsupportedModelError, match=r"'lama'.*all found: if its attention and FFN code equal llama's"):
        anatomy.inspect(model)


def test_every_tiny_family_has_a_row_and_every_row_a_tiny_family():
    assert {tiny_model(f).config.model_type for f in FAMILIES} == set(anatomy.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_models_are_inspected_too(family):
    model = tiny_model(family)
    base = model.base_model
    found = anatomy.inspect(base)
    names = dict(base.named_modules())
    assert all(v.name in names for v in [*found.ffns, *found.attentions])
    assert found.layers[0] is anatomy.inspect(model).layers[0]


def test_a_missing_part_is_named():
    model = tiny_model("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1 of this llama model lacks mlp\.up_proj"):
        anatomy.inspect(model)


def test_a_replaced_projection_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj = torch.nn.Sequential(model.model.layers[1].self_attn.v_proj)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.v_proj is a Sequential.*merge adapters"):
        anatomy.inspect(model)


def test_a_quantised_weight_is_refused():
    model = tiny_model("llama")
    linear = model.model.layers[0].mlp.down_proj
    linear.weight = torch.nn.Parameter(torch.zeros(32, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.down_proj is a Linear, not a plain .*dequantise"):
        anatomy.inspect(model)
