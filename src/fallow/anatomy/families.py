"""The one table of model families: where each keeps its decoder layers, FFN matrices and attention projections.

To add a family:

1. Read its modelling file in transformers. Find the decoder layer's FFN and attention and compare them with the layouts
   below: a gated FFN (`gate`, `up`, `down`), a fused gate-up (`fused=True`), two matrices (no `gate`), or matrices
   that lie in the decoder layer itself (`path=""`); attention with separate or fused projections.
2. Add one row to `FAMILIES`, keyed by the config's `model_type`.
3. Add one row to `tests/tiny_models.py`. Every test over families then runs on it: the dense identity, and the
   gradients of omitted channels and heads against the masked stock model, tell whether the row is right.

Two things in the attention code need a look. Every attribute that is derived from the number of heads and read in
`forward` (a `num_heads` in a `.view`, a `split_size`, a config field) goes into `head_attributes`; code that writes
`.view(*shape, -1, head_dim)` reads none but `num_key_value_groups`. And a norm over all heads jointly (OLMo2) goes into
`joint_norms`: such projections must run whole, and the heads are taken after the norm. Per-head norms need nothing.

The table is the only place that knows families. Guessing the layout of an unknown family from its module names would
accept models whose attention differs in ways that names do not show, so there is an error instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import activations as A


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNLayout:
    """Names of an FFN's parts."""

    up: str
    """Up projection; with `fused`, gate rows stacked on up rows in one matrix."""
    down: str
    act: str
    """The activation module."""
    path: str = "mlp"
    """The FFN module in the decoder layer; "" when the parts lie in the decoder layer itself."""
    gate: str | None = None
    """Gate projection, if it is a matrix of its own."""
    fused: bool = False
    after: tuple[str, ...] = ()
    """Modules the FFN applies to its output (dropout); they stay."""

    def paths(self) -> list[str]:
        """Paths in the decoder layer of everything this layout needs."""
        parts = [p for p in (self.gate, self.up, self.down, self.act, *self.after) if p]
        return [f"{self.path}.{p}" if self.path else p for p in parts]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionLayout:
    """Names of an attention's parts and of the attributes that depend on its number of heads."""

    o: str
    path: str = "self_attn"
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    """The fused projection, instead of `q`, `k`, `v`."""
    qkv_order: Literal["by part", "by head"] = "by part"
    """Rows of the fused projection: all of q, then k, then v; or q, k, v of head 0, then of head 1, …"""
    head_dim: str = "head_dim"
    """Attribute of the attention module that holds the width of one head."""
    head_attributes: tuple[str, ...] = ("num_key_value_groups",)
    """Attributes its forward reads that change with the number of heads kept; known ones: see `HeadGate`."""
    joint_norms: tuple[str, str] | None = None
    """Query and key norm over all heads at once, applied to the output of `q` and `k`."""

    def paths(self) -> list[str]:
        """Paths in the decoder layer of everything this layout needs."""
        parts = [p for p in (self.q, self.k, self.v, self.qkv, self.o, *(self.joint_norms or ())) if p]
        return [f"{self.path}.{p}" for p in parts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row: what `anatomy.inspect` needs to know of a family."""

    layers: str = "model.layers"
    """Path of the list of decoder layers in the causal language model; the first part is optional in a base model."""
    ffn: FFNLayout
    attention: AttentionLayout


GATED = FFNLayout(gate="gate_proj", up="up_proj", down="down_proj", act="act_fn")
SEPARATE = AttentionLayout(q="q_proj", k="k_proj", v="v_proj", o="o_proj")
_LLAMA_LIKE = Family(ffn=GATED, attention=SEPARATE)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "granite": _LLAMA_LIKE,
    "olmo2": Family(
        ffn=GATED,
        attention=AttentionLayout(q="q_proj", k="k_proj", v="v_proj", o="o_proj", joint_norms=("q_norm", "k_norm")),
    ),
    "phi3": Family(
        ffn=FFNLayout(up="gate_up_proj", down="down_proj", act="activation_fn", fused=True),
        attention=AttentionLayout(
            qkv="qkv_proj",
            o="o_proj",
            head_attributes=("num_key_value_groups", "num_key_value_heads", "config.num_attention_heads"),
        ),
    ),
    "arcee": Family(ffn=FFNLayout(up="up_proj", down="down_proj", act="act_fn"), attention=SEPARATE),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        ffn=FFNLayout(up="dense_h_to_4h", down="dense_4h_to_h", act="act"),
        attention=AttentionLayout(
            path="attention",
            qkv="query_key_value",
            qkv_order="by head",
            o="dense",
            head_dim="head_size",
            head_attributes=(),
        ),
    ),
    "gpt2": Family(
        layers="transformer.h",
        ffn=FFNLayout(up="c_fc", down="c_proj", act="act", after=("dropout",)),
        attention=AttentionLayout(path="attn", qkv="c_attn", o="c_proj", head_attributes=("split_size", "num_heads")),
    ),
    "opt": Family(
        layers="model.decoder.layers",
        ffn=FFNLayout(path="", up="fc1", down="fc2", act="activation_fn"),
        attention=AttentionLayout(q="q_proj", k="k_proj", v="v_proj", o="out_proj", head_attributes=("num_heads",)),
    ),
}

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    A.SiLUActivation: "silu",
    nn.ReLU: "relu",
    A.ReLUSquaredActivation: "relu2",
    A.GELUActivation: "gelu",
    A.GELUTanh: "gelu_tanh",
    A.NewGELUActivation: "gelu_tanh",
    A.FastGELUActivation: "gelu_tanh",
    A.AccurateGELUActivation: "gelu_tanh",
}
"""Activation modules by what they compute; the tanh forms of GELU differ in rounding only."""


CONFIG_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""Where configs name the activation of the FFN."""


def activation_name(module: nn.Module) -> str | None:
    """ "silu", "gelu", "gelu_tanh", "relu" or "relu2"; None when the module is none of these."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get(type(module))
