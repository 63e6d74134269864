"""What of a model's architecture an engine must be able to express, so that an export can be refused by name.

The obvious alternative, to write the config and see whether the logits agree, also refuses, but cannot say why: a lost
query bias and a lost multiplier look the same in the logits. Cost: one look at the config and at the biases.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fallow.anatomy import FFNView
from fallow.errors import UnsupportedModelError

_ELSEWHERE = {
    "gemma2": "norms before and after attention and FFN, soft-capped logits",
    "gemma3_text": "norms before and after attention and FFN, a rope per kind of layer",
    "smollm3": "layers without rope",
    "phi3": "fused attention projections",
    "gpt_neox": "a parallel residual, layer norms with bias",
    "gpt2": "learned positions, layer norms with bias",
    "opt": "learned positions, layer norms with bias",
}
_LLAMA_LIKE = ("llama", "mistral", "arcee", "qwen2", "qwen3", "granite", "olmo2")

NAMES = {
    "head_norms": "norms of queries and keys per head",
    "joint_norms": "norms of queries and keys over all heads",
    "norms_after": "norms after attention and FFN instead of before",
}
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def traits(model: PreTrainedModel, ffns: list[FFNView]) -> dict[str, str]:
    """What the model has beyond plain Llama: a key for `Engine.expresses` -> words for the message.

    Keys: attention_bias, ffn_bias, sliding_window, mixed_window (in some layers), head_dim, multipliers, head_norms (of
    q and k, per head), joint_norms (over all heads), norms_after (attention and FFN, none before).

    Raises:
        UnsupportedModelError: no MoE engine fallow writes for has this family's architecture.
    """
    config: Any = model.config
    kind = config.model_type
    if kind not in _LLAMA_LIKE:
        raise UnsupportedModelError(
            f"export: {kind} has {_ELSEWHERE.get(kind, 'an architecture of its own')}, which no MoE target can"
            f" express; families that have one: {', '.join(_LLAMA_LIKE)}"
        )
    found: dict[str, str] = {}
    if bias := [name for name, _ in attention_biases(model)]:
        found["attention_bias"] = f"biases in attention ({bias[0]})"
    for view in ffns:
        weights = view.weights()
        if any(b is not None and bool((b != 0).any()) for b in (weights.b_gate_F, weights.b_up_F, weights.b_down_D)):
            found["ffn_bias"] = f"biases in the FFN ({view.name})"
            break
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        found["mixed_window"] = "sliding-window attention in some layers (layer_types)"
    elif kind == "mistral" and config.sliding_window is not None:
        found["sliding_window"] = f"sliding-window attention (sliding_window {config.sliding_window})"
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        found["head_dim"] = f"head_dim {head_dim(config)}, not hidden_size / num_attention_heads"
    neutral = multipliers(config, neutral=True)
    if odd := [name for name, value in multipliers(config).items() if abs(value - neutral[name]) > 1e-9 * value]:
        found["multipliers"] = f"{odd[0]} {getattr(config, odd[0])}"
    if kind == "qwen3" and not config.num_attention_heads == config.num_key_value_heads == 1:
        found["head_norms"] = NAMES["head_norms"]
    elif kind in ("qwen3", "olmo2"):  # with a single head the two are the same
        found["joint_norms"] = NAMES["joint_norms"]
    if kind == "olmo2":
        found["norms_after"] = NAMES["norms_after"]
    return found


def attention_biases(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Name and bias of the attention projections that have one which is not all zeros."""
    return [
        (name, tensor)
        for name, tensor in model.state_dict().items()
        if ".self_attn." in name and name.endswith("_proj.bias") and bool((tensor != 0).any())
    ]


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def multipliers(config: Any, *, neutral: bool = False) -> dict[str, float]:
    """Granite's four multipliers; of another family, or with `neutral`, those that change nothing."""
    plain = dict.fromkeys(MULTIPLIERS, 1.0) | {"attention_multiplier": head_dim(config) ** -0.5}
    if neutral or config.model_type != "granite":
        return plain
    return {name: float(getattr(config, name)) for name in MULTIPLIERS}
