"""The arms of Upcycle's experiments: what each is, by name, as settings of `fallow.Upcycle` (None: dense)."""

from __future__ import annotations

from typing import Any

TAUGHT: dict[str, Any] = {"bank": 64, "keep": 16, "distill": 0.5}
COMPANION = "runs/experiments/upcycle-cpt/dense/model"
"""The dense arm's result, which has to be there before an arm that it teaches."""
COMPENSATED: dict[str, Any] = TAUGHT | {"distill": 0.7, "teacher": COMPANION, "compensation": 64, "anneal": 0.5}
BOTH: dict[str, Any] = TAUGHT | {"distill": 1.0, "teacher": "self", "compensation": 64}
PARENT_COMPENSATED: dict[str, Any] = TAUGHT | {"compensation": 64}
COMPANION_COMPENSATED: dict[str, Any] = TAUGHT | {"distill": 1.0, "teacher": COMPANION, "compensation": 64}
FITTED: dict[str, Any] = {"fit_tokens": 262_144, "predictor_loss": 0.1}

MAIN: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "quantized": TAUGHT | {"predictor": "quantized"},
    "companion-taught": TAUGHT | {"predictor": "quantized", "distill": 0.7, "teacher": COMPANION},
    "compensated": COMPENSATED | {"predictor": "quantized"},
    "both": BOTH | {"predictor": "quantized"},
    "parent-compensated": PARENT_COMPENSATED | {"predictor": "quantized"},
    "companion-compensated": COMPANION_COMPENSATED | {"predictor": "quantized"},
    "random": TAUGHT | {"selection": "random"},
    "bilinear": TAUGHT | FITTED | {"predictor": "bilinear", "rank": 128},
    "linear": TAUGHT | FITTED | {"predictor": "linear", "rank": 64},
}
"""Companion, the three kinds, and the control by chance."""
SHORT: dict[str, dict[str, Any] | None] = {
    "no-teacher": TAUGHT | {"distill": 0.0},
    "teacher-only": TAUGHT | {"distill": 1.0},
    "layers": TAUGHT | {"hidden_loss": 0.1},
    "annealed": TAUGHT | {"anneal": 0.5},
    "bilinear-hard": TAUGHT | FITTED | {"predictor": "bilinear", "rank": 128, "gate": "hard"},
    "bilinear-soft-topk": TAUGHT | FITTED | {"predictor": "bilinear", "rank": 128, "gate": "soft_topk"},
    "bilinear-64": TAUGHT | FITTED | {"predictor": "bilinear", "rank": 64},
    "linear-smooth": TAUGHT | FITTED | {"predictor": "linear", "rank": 64, "gate": "smooth"},
}
"""Ablations of teacher, gate, annealing and rank."""
LONG_COMPANION = "runs/experiments/upcycle-cpt/dense-long/model"
LONG: dict[str, dict[str, Any] | None] = {
    "dense-long": None,
    "both-long": MAIN["both"],
    "companion-compensated-long": COMPANION_COMPENSATED | {"predictor": "quantized", "teacher": LONG_COMPANION},
}
"""On ten times the tokens, for a GPU."""
LONG_RECIPE: dict[str, Any] = {"batch_size": 16, "accumulate": 1, "steps": 1000, "lr": 4.0e-4, "save_every": 500}
ARMS = MAIN | SHORT | LONG
SETS = {"main": list(MAIN), "ablations": list(SHORT), "long": list(LONG)}
