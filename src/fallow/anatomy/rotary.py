"""Families whose decoder layers are called as Llama's are, for a decoding step that calls them itself."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

__all__ = ["LIKE_LLAMA", "apply_rotary_pos_emb", "like_llama", "plain_projections"]

LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
"""Embedding, layers of (x, mask, cos and sin, cache), a norm, a head, and nothing between them."""
ROPES = ("default", "linear", "llama3", "yarn")
"""Whose frequencies do not change as a text grows."""


def like_llama(model: PreTrainedModel) -> tuple[bool, str]:
    """Whether every layer of this model attends to all places before it and is called as Llama's, and why (not)."""
    config: Any = model.config
    if config.model_type not in LIKE_LLAMA:
        return False, f"{config.model_type} is none of {', '.join(LIKE_LLAMA)}"
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"} or (config.model_type == "mistral" and config.sliding_window is not None):
        return False, "a sliding window"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return (True, "a layer at a time") if rope in ROPES else (False, f"rope of type {rope}")


def plain_projections(model: Any) -> bool:
    """Whether query, key and value of a model that is `like_llama` are products alone: no bias, no norm of heads."""
    return all(
        all(p.bias is None for p in (a.q_proj, a.k_proj, a.v_proj)) and not hasattr(a, "q_norm")
        for a in (module.self_attn for module in model.model.layers)
    )
