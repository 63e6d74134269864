"""Operations on tensors, one folder each; `report()` says which backend of each is available, which ran, and why."""

from __future__ import annotations

from importlib import import_module

_OPS = (
    "subset_ffn",
    "subset_linear",
    "attention",
    "cross_entropy",
    "adamw",
    "packed",
    "block_linear",
    "expert_ffn",
    "bank_ffn",
    "divergence",
    "row_linear",
    "row_attention",
)

OF_SPARSE_METHODS = frozenset(
    {"subset_ffn", "subset_linear", "packed", "block_linear", "expert_ffn", "bank_ffn", "divergence"}
)
"""Operations that no dense run uses."""


def report() -> list[dict[str, object]]:
    """One row per op and backend: `{"op", "backend", "available", "reason", "last_used"}`."""
    rows: list[dict[str, object]] = []
    for op in _OPS:
        module = import_module(f"fallow.ops.{op}")
        for backend in module.BACKENDS:
            ok, reason = backend.available()
            rows.append(
                {
                    "op": op,
                    "backend": backend.name,
                    "available": ok,
                    "reason": reason,
                    "last_used": module.last_used == backend.name,
                }
            )
    return rows


def used() -> dict[str, str]:
    """`{op: backend}` of the ops that have run in this process."""
    return {str(r["op"]): str(r["backend"]) for r in report() if r["last_used"]}
