"""`--to flex_olmo`: OLMo2 with experts: norms of queries and keys over all heads, norms after attention and FFN."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from fallow.exporting import Written
from fallow.exporting.moe import Engine, write_stock
from fallow.exporting.olmoe import settings
from fallow.exporting.qwen3_moe import ffn
from fallow.exporting.traits import head_dim

ENGINE = Engine(
    name="flex_olmo",
    expresses=frozenset({"head_dim", "joint_norms", "norms_after"}),
    requires=frozenset({"joint_norms", "norms_after"}),
    weighting="raw",
    settings=lambda model, experts: settings(model, experts) | {"head_dim": head_dim(model.config)},
    ffn=ffn,
)


def write(model: PreTrainedModel, folder: Path) -> Written:
    """Fill `folder` and verify it; see `write_stock`."""
    return write_stock(model, folder, ENGINE)
