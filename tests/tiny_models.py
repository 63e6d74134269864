"""Tiny random models, one per family fallow knows: two layers, a few thousand weights, no dropout, no cache.

Built from a config, never downloaded. Every test that needs "some model of every family" uses this factory, so a new
family joins all of them with one row here. Weights are drawn wider than the stock initialisation (std 0.1 instead of
0.02), and biases and norm weights are made non-trivial, so that a path that drops one changes the logits by more than
rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 128
D_MODEL = 32
N_HEADS = 4
N_KV_HEADS = 2
N_CHANNELS = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": D_MODEL,
    "intermediate_size": N_CHANNELS,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
}
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": None}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 16}),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**_LLAMA_LIKE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "smollm3": ("smollm3", {**_LLAMA_LIKE, "no_rope_layer_interval": 2}),
    "granite": ("granite", {**_LLAMA_LIKE, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "arcee": ("arcee", {**_LLAMA_LIKE, "hidden_act": "relu2"}),
    "phi3": ("phi3", {**_LLAMA_LIKE, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt_neox": (
        "gpt_neox",
        {
            **_COMMON,
            "hidden_size": D_MODEL,
            "intermediate_size": N_CHANNELS,
            "num_hidden_layers": 2,
            "num_attention_heads": N_HEADS,
            "max_position_embeddings": 128,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            **_COMMON,
            "n_embd": D_MODEL,
            "n_inner": N_CHANNELS,
            "n_layer": 2,
            "n_head": N_HEADS,
            "n_positions": 128,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "opt": (
        "opt",
        {
            **_COMMON,
            "hidden_size": D_MODEL,
            "word_embed_proj_dim": D_MODEL,
            "ffn_dim": N_CHANNELS,
            "num_hidden_layers": 2,
            "num_attention_heads": N_HEADS,
            "max_position_embeddings": 128,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
}

FAMILIES: tuple[str, ...] = tuple(_SETTINGS)
"""The families of fallow's table, in its order; every one of them can be given to `tiny_model`."""


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny random causal LM of `family` in training mode (dropout is 0 everywhere); `overrides` are config fields."""
    model_type, settings = _SETTINGS[family]
    config = CONFIG_MAPPING[model_type](**{**settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
                elif name.endswith("bias") or "norm" in name or "ln_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).train()


def tiny_batch(*, seed: int = 0, batch: int = 2, tokens: int = 12) -> dict[str, torch.Tensor]:
    """Random token ids of shape [batch, tokens] with a full attention mask and labels, for any `tiny_model`."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, VOCAB, (batch, tokens), generator=generator)
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT.clone()}
