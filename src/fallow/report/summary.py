"""The page's figures as JSON, for scripts and for `fallow report --json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fallow.report import wording
from fallow.report.analysis import Comparison, Spread
from fallow.report.doubts import doubts


def summary(comparison: Comparison, notes: Sequence[str]) -> dict[str, Any]:
    """Headline, baseline, every arm's figures, doubts and notes.

    `eval_loss` and the gaps are of the arm as `judged`: an upcycled one computed sparse, as it is served, all others
    dense. `eval_loss_dense` is the other loss of the former, `eval_loss_sparse` of any that measured it.
    """
    first = wording.headline(comparison)

    def spread(value: Spread | None) -> dict[str, Any] | None:
        return value and {"mean": value.mean, "low": value.low, "high": value.high, "runs": len(value.values)}

    return {
        "headline": first.title,
        "detail": first.sentence,
        "outcome": first.outcome,
        "baseline": comparison.baseline and comparison.baseline.name,
        "arms": [
            {
                "arm": arm.name,
                "method": arm.method,
                "status": arm.status,
                "runs": [str(run.path) for run in arm.runs],
                "tokens_per_second": spread(arm.tokens_per_second),
                "speedup_tokens_per_second": spread(arm.ratio),
                "eval_loss": spread(arm.loss),
                "eval_loss_sparse": spread(arm.sparse_loss),
                "eval_loss_dense": spread(arm.dense_loss),
                "judged": "sparse" if arm.dense_loss else "dense",
                "loss_gap_equal_tokens": spread(arm.gap_tokens),
                "loss_gap_equal_seconds": spread(arm.gap_seconds),
                "equal_seconds_control": arm.control,
                "peak_memory_mb": spread(arm.peak_memory_mb),
                "model_state_bytes": spread(arm.state_bytes),
                "train_seconds": spread(arm.train_seconds),
                "tokens": spread(arm.tokens),
            }
            for arm in comparison.arms
        ],
        "doubts": doubts(comparison),
        "notes": list(notes),
    }
