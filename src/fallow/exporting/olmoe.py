"""`--to olmoe`: norms of queries and keys over all heads, norms before attention and FFN. Probabilities stay raw.

A model without those norms cannot be written so: an RMS norm has no setting that changes nothing. OLMo2 has them but
normalises after attention and FFN; its MoE is `flex_olmo`. Of the families fallow trains that leaves Qwen3 with a
single head, where "per head" and "over all heads" are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fallow.exporting import Written
from fallow.exporting.moe import Engine, Experts, write_stock
from fallow.exporting.qwen3_moe import ffn


def settings(model: PreTrainedModel, experts: Experts) -> dict[str, Any]:
    """What OLMoE and FlexOlmo are told."""
    return {
        "num_experts": experts.n_experts,
        "intermediate_size": experts.channels,
        "norm_topk_prob": False,
    }


ENGINE = Engine(
    name="olmoe",
    expresses=frozenset({"joint_norms"}),
    requires=frozenset({"joint_norms"}),
    weighting="raw",
    settings=settings,
    ffn=ffn,
)


def write(model: PreTrainedModel, folder: Path) -> Written:
    """Fill `folder` and verify it; see `write_stock`."""
    return write_stock(model, folder, ENGINE)
