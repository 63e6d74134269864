"""Gives `fallow.ops.attention` to a transformers model, through the library's own registry of attention functions.

Nothing is patched: the functions are registered under the name "fallow_cpu" the first time a model asks for them, and
the model's attention implementation is set to that name. What the op does not serve (decoding, dropout) goes to
PyTorch's SDPA call by call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fallow.ops.attention import cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fallow_cpu"

_before: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface (whence `**kwargs`: every model adds its own); returns [B, T, H, d]."""
    from fallow.ops import attention as room

    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    served, _ = cpu.usable(query, key, value, attention_mask, dropout)
    if not served or any(kwargs.get(k) is not None for k in ("softcap", "s_aux", "position_bias", "cache")):
        room.last_used = "sdpa"
        return _stock(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = room.attention(query, key, value, scale=scale, mask=attention_mask, causal=causal)
    return out.transpose(1, 2), None


def _stock(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """transformers' SDPA function, or SDPA itself where heads were omitted and the module's group count is stale."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = query.shape[1] // key.shape[1]
    if groups == getattr(module, "num_key_value_groups", 1) or kwargs.get("cache") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    out = nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=is_causal and attention_mask is None and query.shape[2] > 1,
    )
    return out.transpose(1, 2).contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention_forward)
    # bool masks, and None when neither packing nor padding nor a window deviates from causal
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _refusal(model: PreTrainedModel) -> str | None:
    """Why this model keeps its attention, or None when fallow's serves it."""
    config = model.config.get_text_config()
    parameter = next(model.parameters())
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} does not use transformers' attention interface"
    if not getattr(model, "_supports_sdpa", False):
        return f"{type(model).__name__} does not support SDPA"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention caps logits (attn_logit_softcapping)"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        return "its attention has sinks"
    if parameter.device.type != "cpu":
        return f"it is on {parameter.device}, where SDPA is the faster one"
    if parameter.dtype not in (torch.bfloat16, torch.float32):
        return f"its weights are {parameter.dtype}; served are bfloat16 and float32"
    return None


def enable(model: PreTrainedModel) -> str:
    """Let `model` use fallow's CPU attention where it can; returns one line that says what was done and why.

    Models it cannot serve are left as they are. `disable(model)` undoes it; saved configs do not mention it.
    """
    current = str(model.config._attn_implementation)
    if current == NAME:
        return f"attention: {NAME} already"
    reason = _refusal(model)
    if reason is not None:
        return f"attention: {current} kept, because {reason}"
    _register()
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return f"attention: {current} kept, because transformers refused to set another one"
    _before[model] = current
    return f"attention: {NAME} (grouped blocked GEMMs, upper triangle skipped) instead of {current}"


def disable(model: PreTrainedModel) -> None:
    """Give `model` back the attention implementation it had before `enable`; nothing happens to another model."""
    before = _before.pop(model, None)
    if before is not None:
        model.set_attn_implementation(before)
