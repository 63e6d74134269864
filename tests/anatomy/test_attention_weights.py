"""The value and output weights an attention view reads are the ones the stock attention computes with."""

from __future__ import annotations

import pytest
import torch

from fallow import anatomy
from tiny_models import FAMILIES, tiny_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_v_and_o_weights_are_the_ones_attention_uses(family):
    """The attention's output at the first token is W_o (W_v x) per head: it attends to itself alone."""
    model = tiny_model(family).eval()
    view = anatomy.inspect(model).attentions[0]
    seen = {}
    attention = model.get_submodule(view.name)
    attention.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(x=args[0] if args else kwargs["hidden_states"], y=out[0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**tiny_batch(tokens=3))
        zero_x = torch.zeros(32)
        b_v = b_o = zero_x[:1]
        if family in ("gpt2", "gpt_neox"):
            qkv = (
                attention.c_attn.bias
                if family == "gpt2"
                else attention.query_key_value.bias.view(4, 3, 8).transpose(0, 1)
            )
            b_v, b_o = qkv.reshape(3, 32)[2], (attention.c_proj if family == "gpt2" else attention.dense).bias
        elif family in ("opt", "qwen2"):
            b_v = attention.v_proj.bias
            b_o = attention.out_proj.bias if family == "opt" else b_o
        v = (seen["x"][:, 0] @ view.v_weight().t() + b_v).view(2, view.n_kv_heads, 1, view.head_dim)
        v = v.expand(-1, -1, view.n_heads // view.n_kv_heads, -1).flatten(1)
        torch.testing.assert_close(v @ view.o_weight().t() + b_o, seen["y"][:, 0], rtol=1e-4, atol=1e-5)
