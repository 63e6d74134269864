"""`--to mixtral`: the architecture that transformers, vLLM and most others run. Plain Llama attention, nothing else.

It can have a sliding window in all layers. Checkpoint names are Mixtral's first ones (`block_sparse_moe.experts.E.w1`),
which every engine reads; transformers 5 merges them when it loads.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from fallow.exporting import Written
from fallow.exporting.moe import Engine, Experts, Folded, write_stock
from fallow.exporting.traits import head_dim


def _settings(model: PreTrainedModel, experts: Experts) -> dict:
    window = model.config.sliding_window if model.config.model_type == "mistral" else None
    return {
        "num_local_experts": experts.n_experts,
        "intermediate_size": experts.channels,
        "head_dim": head_dim(model.config),
        "sliding_window": window,
    }


def _ffn(layer: str, folded: Folded) -> dict[str, Tensor]:
    named = {f"{layer}.block_sparse_moe.gate.weight": folded.router_ED}
    for e in range(len(folded.router_ED)):
        expert = f"{layer}.block_sparse_moe.experts.{e}"
        named[f"{expert}.w1.weight"] = folded.gate_ECD[e]
        named[f"{expert}.w2.weight"] = folded.down_EDC[e]
        named[f"{expert}.w3.weight"] = folded.up_ECD[e]
    return named


ENGINE = Engine(
    name="mixtral",
    expresses=frozenset({"head_dim", "sliding_window"}),
    weighting="renormalised",
    settings=_settings,
    ffn=_ffn,
)


def write(model: PreTrainedModel, folder: Path) -> Written:
    """Fill `folder` and verify it; see `write_stock`."""
    return write_stock(model, folder, ENGINE)
