"""The arms of SSD's experiments: what each is, by name, as data.

`ssd` is the method with thresholds for a run of 200 steps. `fixed-partition` makes one partition at the first switch
and keeps it; `random-partition` is SSD with experts by chance; `always-sparse` never is dense;
`moe` is a native Mixtral with the same active and total weights; `small` is a dense model with the FFN that a sparse
token computes, `small-long` with more steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXPERTS, ACTIVE = 16, 4
MODELS: dict[str, dict[str, int]] = {
    "wide": {},
    "deep": {"intermediate_size": 1024, "num_hidden_layers": 5},
    "broad": {
        "hidden_size": 384,
        "intermediate_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "large": {
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}
"""What differs from the recipe's architecture: FFNs of 8, of 4 and twice again of 8 times the width; 8.4M, 6.3M, 9.8M
and 63M weights. `large` is the model of the bench's step-1024."""


PREFIX = {"wide": "", "deep": "deep-", "broad": "broad-", "large": "large-"}
"""What names of arms and of prices begin with, by model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One form of training."""

    name: str
    ssd: dict[str, Any] | None = None
    """Settings of `fallow.SSD`; None trains dense."""
    model: str = "wide"
    ffn_share: float = 1.0
    """FFN channels, as a share of the model's."""
    native_moe: bool = False
    """A Mixtral of transformers in the place of the Llama."""
    steps_scale: float = 1.0
    matrix_lr: float = 1.0
    """The matrices' learning rate, of what was tuned at the recipe's width."""


SSD_SETTINGS: dict[str, Any] = {
    "experts": EXPERTS,
    "active": ACTIVE,
    "zeros": 0.5,
    "similarity": 0.8,
    "monitor_every": 0.05,
    "dense_start": 0.1,
    "sparse_share": 0.35,
    "dense_share": 0.05,
    "end_share": 0.15,
    "max_gap": 0.3,
}
ONCE: dict[str, Any] = {"schedule": "fixed", "sparse_share": 1.0}
FEWER: dict[str, Any] = {"experts": 8, "active": 2}


def _ssd(name: str, model: str = "wide", steps_scale: float = 1.0, matrix_lr: float = 1.0, **settings: Any) -> Arm:
    return Arm(name=name, model=model, steps_scale=steps_scale, matrix_lr=matrix_lr, ssd=SSD_SETTINGS | settings)


MAIN = [
    Arm(name="dense"),
    _ssd("ssd"),
    _ssd("ssd-half", active=EXPERTS // 2),
    _ssd("ssd-half-early", active=EXPERTS // 2, similarity=0.4),
    _ssd("ssd-half-120", active=EXPERTS // 2, similarity=0.4, steps_scale=1.2),
    _ssd("always-sparse", schedule="always_sparse"),
    _ssd("random-partition", partition="random", router="centroid"),
    Arm(name="moe", native_moe=True),
    Arm(name="small", ffn_share=ACTIVE / EXPERTS),
    Arm(name="dense-080", steps_scale=0.8),
    _ssd("fixed-partition", **ONCE),
    _ssd("fixed-partition-120", steps_scale=1.2, **ONCE),
]
BROAD = [
    _ssd("fixed-eight-120", steps_scale=1.2, **FEWER, **ONCE),
    Arm(name="broad-dense", model="broad"),
    _ssd("broad-fixed-eight", model="broad", **FEWER, **ONCE),
    _ssd("broad-fixed-eight-120", model="broad", steps_scale=1.2, **FEWER, **ONCE),
]
"""Fewer, fatter experts, whose GEMMs are large enough for AMX, on the widest model of the size."""
LARGE = [
    Arm(name="large-dense", model="large"),
    Arm(name="large-dense-lr50", model="large", matrix_lr=0.5),
    _ssd("large-fixed-115-lr50", model="large", steps_scale=1.15, matrix_lr=0.5, **ONCE),
    _ssd("large-fixed-120-lr50", model="large", steps_scale=1.2, matrix_lr=0.5, **ONCE),
    _ssd("large-fixed-115", model="large", steps_scale=1.15, **ONCE),
    _ssd("large-fixed-120", model="large", steps_scale=1.2, **ONCE),
]
"""A width at which the experts' GEMMs run near AMX's pace."""
DEEP = [
    Arm(name="deep-dense", model="deep"),
    _ssd("deep-ssd", model="deep"),
    _ssd("deep-ssd-half", model="deep", active=EXPERTS // 2),
    Arm(name="deep-small", model="deep", ffn_share=ACTIVE / EXPERTS),
    _ssd("deep-ssd-eight", model="deep", **FEWER),
]
ABLATIONS = [
    _ssd("ssd-end30", end_share=0.3),
    _ssd("paper-partition", cluster_by="weights", router="centroid"),
    _ssd("ssd-early", similarity=0.4),
    _ssd("ssd-dense-end", end="dense"),
    _ssd("ssd-router-fixed", router_lr=0.0),
    _ssd("ssd-eight", **FEWER),
    Arm(name="small-long", ffn_share=ACTIVE / EXPERTS, steps_scale=1.5),
]
ARMS = {arm.name: arm for arm in (*MAIN, *BROAD, *LARGE, *DEEP, *ABLATIONS)}
SETS: dict[str, list[Arm]] = {"main": MAIN, "broad": BROAD, "large": LARGE, "deep": DEEP, "ablations": ABLATIONS}
