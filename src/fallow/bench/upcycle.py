"""`fallow bench upcycle`: FFNs that read the living channels only, one FFN (upcycle_ffn.py) and whole models decoding
(upcycle_decode.py), against the fastest dense form of each.

Ratios are per batch of tokens that decode together: as these choose for themselves, more of them want more rows, and
`break_even` is the number up to which sparse is faster. Nothing is printed when a kernel differs from its naive truth.
"""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

from fallow.bench import upcycle_ffn
from fallow.bench.gate_upcycle import check_bank_ffn
from fallow.errors import ConfigError
from fallow.machine import describe

KEEP = 16
WHOLE = ("e2e-1b", "e2e-135m")
"""Cases of upcycle_decode.py, which imports much and is imported when they run."""


def run(
    cases: list[str] | None = None,
    *,
    quick: bool = False,
    keeps: tuple[int, ...] = (KEEP,),
    rounds: int | None = None,
    compiled: bool = True,
) -> dict[str, Any]:
    """All rows as one JSON-ready dict (schema: architecture.md).

    Args:
        cases: of `upcycle_ffn.SHAPES` and `WHOLE`; None: all of them, but for whole models that cannot be had here,
            which are listed under "skipped".
        quick: three rounds, nothing compiled, batches of 1 and 4: a look, not a result.
        keeps: living channels of every bank of 64, of the FFN cases.

    Raises:
        ConfigError: an unknown case, a keep out of range. GateError: a kernel differs from its truth.
    """
    known = (*upcycle_ffn.SHAPES, *WHOLE)
    if unknown := sorted(set(cases or []) - set(known)):
        raise ConfigError(f"bench upcycle: unknown case {', '.join(unknown)}; use {', '.join(known)}")
    for keep in keeps:
        if not 1 <= keep <= upcycle_ffn.BANK:
            raise ConfigError(
                f"bench upcycle: keep={keep}; of banks of {upcycle_ffn.BANK} keep 1 to {upcycle_ffn.BANK}"
            )
    gate = check_bank_ffn()
    options = {"rounds": rounds or (3 if quick else 9), "compiled": compiled and not quick}
    options |= {"tokens": (1, 4)} if quick else {}
    rows: list[dict[str, Any]] = []
    for case in (c for c in cases or known if c in upcycle_ffn.SHAPES):
        for dtype in upcycle_ffn.DTYPES:
            for keep in keeps:
                rows += upcycle_ffn.rows(case, dtype, keep=keep, **options)
                gc.collect()
    skipped = _add_whole_models(rows, cases, quick, rounds)
    return {
        "bench": "upcycle",
        "machine": describe(),
        "gate": "passed",
        "gate_errors": gate,
        "rows": rows,
        "skipped": skipped,
        "break_even": break_even([r for r in rows if r["case"] in upcycle_ffn.SHAPES]),
    }


def _add_whole_models(
    rows: list[dict[str, Any]], cases: list[str] | None, quick: bool, rounds: int | None
) -> dict[str, str]:
    """Why cases that nobody asked for by name could not run."""
    skipped: dict[str, str] = {}
    for case in (c for c in cases or WHOLE if c in WHOLE):
        from fallow.bench import upcycle_decode

        try:
            rows += upcycle_decode.rows(quick, (case,), rounds=rounds)
        except ConfigError as error:
            if cases:
                raise
            skipped[case] = str(error)
        gc.collect()
    return skipped


def break_even(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The number of tokens that decode together up to which sparse is as fast as dense, per case, dtype, predictor and
    keep. Between two measured batches the cost is taken to be linear; where sparse is faster at all of them it is the
    largest measured. None where it is slower already for one token.
    """
    found: dict[str, float | None] = {}
    for key in dict.fromkeys((r["case"], r["dtype"], r["form"], r["keep"]) for r in rows):
        points = sorted(
            (r["tokens"], 1 / r["ratio"]) for r in rows if (r["case"], r["dtype"], r["form"], r["keep"]) == key
        )
        case, dtype, form, keep = key
        found[f"{case} {dtype} {form} keep {keep}"] = _crossing(points)
    return found


def _crossing(points: list[tuple[int, float]]) -> float | None:
    """Where the cost of `points`, (tokens, sparse time / dense time), first passes 1."""
    if points[0][1] > 1:
        return None
    for (t0, c0), (t1, c1) in pairwise(points):
        if c1 > 1:
            return t0 + (t1 - t0) * (1 - c0) / (c1 - c0)
    return float(points[-1][0])
