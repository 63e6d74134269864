"""`fallow bench sat`: one training step, SAT against the fastest dense, per shape, with the FLOP-ideal beside it.

A step is zero_grad, forward, backward and the AdamW step, in bf16 with fp32 master weights, on 2,048 tokens. Dense
runs in several honest forms (stock attention, fallow's CPU attention, compiled) and the fastest is the baseline.
Nothing is printed when a sparse kernel differs from its naive truth.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

import fallow
from fallow.bench.gate import check_all
from fallow.bench.harness import interleave
from fallow.bench.steps import CASES, Case, Form, build, layers_of
from fallow.errors import ConfigError
from fallow.machine import describe
from fallow.methods.sat import SAT
from fallow.ops import attention as fast_attention
from fallow.ops import used
from fallow.optim import adamw_for


def _forms(case: Case, dtype: torch.dtype, ids: torch.Tensor, config: SAT | None, *, compiled: bool) -> dict[str, Form]:
    """The forms of dense (`config` None) or of SAT."""
    name = "dense" if config is None else "sparse"
    forms: dict[str, Form] = {}
    for variant in ("eager", "compiled") if compiled else ("eager",):
        model = build(case, dtype)
        if variant == "compiled":
            fast_attention.enable(model)  # before compiling, so that the graph holds it
        handle = None if config is None else fallow.sparsify(model, config)
        optimizer = adamw_for(model, lr=1e-5) if handle is None else handle.optimizer(lr=1e-5)
        shared = {"model": model, "optimizer": optimizer, "ids": ids, "handle": handle}
        if variant == "compiled":
            for layer in layers_of(model):
                layer.compile(dynamic=False)
            forms[f"{name}/compiled"] = Form(**shared, fast=True)
        else:
            forms[f"{name}/sdpa"] = Form(**shared, fast=False)
            forms[f"{name}/fallow_cpu"] = Form(**shared, fast=True)
    return forms


def _row(case: Case, dtype: torch.dtype, config: SAT, *, rounds: int, compiled: bool) -> dict[str, Any]:
    ids = case.ids()
    forms = _forms(case, dtype, ids, None, compiled=compiled) | _forms(case, dtype, ids, config, compiled=compiled)
    steps = {name: form.step for name, form in forms.items()}
    prepare = {name: form.prepare for name, form in forms.items()}
    interleave(steps, rounds=0, warm_up=2, prepare=prepare)
    for form in forms.values():
        form.selection_seconds, form.steps = 0.0, 0
    timing = interleave(steps, rounds=rounds, warm_up=0, prepare=prepare)
    dense, fastest = timing.fastest("dense/"), timing.fastest("sparse/")
    form = forms[fastest]
    per_layer = form.handle.layer_metrics()
    shape = case.shape
    ideal = shape.step_flops(case.tokens, case.seq_len) / shape.step_flops(
        case.tokens,
        case.seq_len,
        [1 - r for r in per_layer["omit_ffn"]],
        [1 - r for r in per_layer["omit_heads"]],
        omit_in=config.omit_in,
    )
    ratio = timing.ratio(dense, fastest)
    selection = form.selection_seconds / sum(timing.seconds[fastest])
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "omit": config.omit,
        "heads": config.heads,
        "omit_in": config.omit_in,
        "dense_ms": 1e3 * timing.median(dense),
        "sparse_ms": 1e3 * timing.median(fastest),
        "ratio": ratio,
        "ratio_quartiles": timing.spread(dense, fastest),
        "ideal": ideal,
        "efficiency": ratio / ideal,
        "selection_share": selection,
        "backend": used().get("subset_ffn", "none"),
        "dense_form": dense,
        "sparse_form": fastest,
        "rounds": rounds,
        "forms_ms": {name: 1e3 * timing.median(name) for name in timing.seconds},
    }


def break_even(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Per case, the omission rate at which SAT costs as much as dense: the line through two measured rates, at ratio
    1."""
    result: dict[str, float | None] = {}
    for case in dict.fromkeys(r["case"] for r in rows):
        points = sorted((r["omit"], 1 / r["ratio"]) for r in rows if r["case"] == case)
        if len(points) < 2 or points[-1][0] == points[0][0]:
            result[case] = None
            continue
        (r0, c0), (r1, c1) = points[0], points[-1]
        slope = (c1 - c0) / (r1 - r0)
        result[case] = max(0.0, r0 + (1 - c0) / slope) if slope < 0 else None
    return result


def run(
    cases: list[str] | None = None,
    *,
    quick: bool = False,
    rates: tuple[float, ...] = (0.25, 0.5),
    rounds: int | None = None,
    compiled: bool = True,
    lazy: bool = False,
    omit_in: str = "forward+backward",
) -> dict[str, Any]:
    """All rows as one JSON-ready dict (schema: architecture.md, "bench"). Heads are omitted at the same rate as
    channels where `omit_in` is "forward+backward".

    Raises:
        ConfigError: an unknown case or setting. GateError: a kernel differs from its truth.
    """
    unknown = sorted(set(cases or ()) - set(CASES))
    if unknown:
        raise ConfigError(f"bench sat: unknown case {', '.join(unknown)}; use {', '.join(CASES)}")
    gate = check_all()
    rows = []
    for name in cases or CASES:
        for rate in rates:
            heads = rate if omit_in == "forward+backward" else 0.0
            config = SAT(omit=rate, heads=heads, omit_in=omit_in, ladder=0, lazy=lazy)  # type: ignore[arg-type]
            # whole refresh intervals, so that choosing is counted as often as it happens
            n = rounds or (4 if quick else 8)
            rows.append(_row(CASES[name], torch.bfloat16, config, rounds=n, compiled=compiled and not quick))
            gc.collect()
    return {
        "bench": "sat",
        "machine": describe(),
        "gate": "passed",
        "gate_errors": gate,
        "rows": rows,
        "break_even": break_even(rows),
    }
