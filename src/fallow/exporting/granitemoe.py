"""`--to granitemoe`: Llama attention with optional biases, and Granite's four multipliers. No sliding window.

The multipliers are 1 for other families, but for the attention's, which is the usual 1/sqrt(head_dim) written out.
Biases exist on all four projections or on none, so Qwen2, which has none on the output, gets zeros there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fallow.exporting import Written
from fallow.exporting.moe import Engine, Experts, Folded, write_stock
from fallow.exporting.traits import attention_biases, head_dim, multipliers


def _settings(model: PreTrainedModel, experts: Experts) -> dict:
    return {
        "num_local_experts": experts.n_experts,
        "intermediate_size": experts.channels,
        "head_dim": head_dim(model.config),
        "attention_bias": bool(attention_biases(model)),
        **multipliers(model.config),
    }


def _ffn(layer: str, folded: Folded) -> dict[str, Tensor]:
    moe = f"{layer}.block_sparse_moe"
    return {
        f"{moe}.router.layer.weight": folded.router_ED,
        f"{moe}.input_linear.weight": torch.cat((folded.gate_ECD, folded.up_ECD), dim=1),
        f"{moe}.output_linear.weight": folded.down_EDC,
    }


def _rest(model: PreTrainedModel) -> dict[str, Tensor]:
    if not attention_biases(model):
        return {}
    present = model.state_dict()
    weights = [x for x in present if ".self_attn." in x and x.endswith("_proj.weight")]
    lacking = [x for x in weights if x.replace("weight", "bias") not in present]
    return {x.replace("weight", "bias"): torch.zeros_like(present[x][:, 0]) for x in lacking}


ENGINE = Engine(
    name="granitemoe",
    expresses=frozenset({"attention_bias", "head_dim", "multipliers"}),
    weighting="renormalised",
    settings=_settings,
    ffn=_ffn,
    rest=_rest,
)


def write(model: PreTrainedModel, folder: Path) -> Written:
    """Fill `folder` and verify it; see `write_stock`."""
    return write_stock(model, folder, ENGINE)
