"""`--to qwen3_moe`: Llama attention with a norm of queries and keys per head, for models of the Qwen3 family.

`norm_topk_prob` is written as true, as in Qwen's own checkpoints, so the folding is Mixtral's.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from fallow.exporting import Written
from fallow.exporting.moe import Engine, Experts, Folded, write_stock
from fallow.exporting.traits import head_dim


def _settings(model: PreTrainedModel, experts: Experts) -> dict:
    return {
        "num_experts": experts.n_experts,
        "moe_intermediate_size": experts.channels,
        "intermediate_size": experts.channels * experts.n_experts,
        "head_dim": head_dim(model.config),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }


def ffn(layer: str, folded: Folded) -> dict[str, Tensor]:
    """Qwen's and OLMo's names."""
    named = {f"{layer}.mlp.gate.weight": folded.router_ED}
    for e in range(len(folded.router_ED)):
        expert = f"{layer}.mlp.experts.{e}"
        named[f"{expert}.gate_proj.weight"] = folded.gate_ECD[e]
        named[f"{expert}.up_proj.weight"] = folded.up_ECD[e]
        named[f"{expert}.down_proj.weight"] = folded.down_EDC[e]
    return named


ENGINE = Engine(
    name="qwen3_moe",
    expresses=frozenset({"head_dim", "head_norms"}),
    requires=frozenset({"head_norms"}),
    weighting="renormalised",
    settings=_settings,
    ffn=ffn,
)


def write(model: PreTrainedModel, folder: Path) -> Written:
    """Fill `folder` and verify it; see `write_stock`."""
    return write_stock(model, folder, ENGINE)
