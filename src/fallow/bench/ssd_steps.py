"""Whole training steps of a sparse phase against the fastest dense: what `expert_ffn` gives inside a model.

A step is zero_grad, forward, backward and AdamW, the same ReGLU Llama in every form, in bf16 with fp32 masters and in
fp32, eager and compiled. `ratio` is against the fastest dense form of any dtype, `ratio_same_dtype` against dense in
the row's own. `ideal` counts multiplications of linear layers, attention and head; norms, softmax, the loss and the
optimizer, which updates all weights in either form, are the gap.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

import fallow
from fallow.bench.flops import Shape
from fallow.bench.harness import Step, interleave
from fallow.bench.steps import Case, Form, build, layers_of
from fallow.methods.ssd import SSD
from fallow.ops import attention as fast_attention
from fallow.ops import used
from fallow.optim import adamw_for

CASES = {
    c.name: c
    for c in (
        Case("step-512", Shape(512, 4096, 8, 8, 64, layers=4, vocab=8192), 16, 256),
        Case("step-1024", Shape(1024, 8192, 16, 16, 64, layers=2, vocab=8192), 16, 256),
    )
}
"""FFNs of 8 times the width; 4,096 tokens a step."""
EXPERTS, ACTIVE = 16, 4


def _forms(case: Case, config: SSD | None, dtype: torch.dtype, *, compiled: bool) -> dict[str, Form]:
    name = f"{'dense' if config is None else 'sparse'}/{str(dtype).removeprefix('torch.')}"
    forms: dict[str, Form] = {}
    for variant in ("eager", "compiled") if compiled else ("eager",):
        model = build(case, dtype, act="relu")
        fast_attention.enable(model)
        handle = None if config is None else fallow.sparsify(model, config)
        optimizer = adamw_for(model, lr=1e-5) if handle is None else handle.optimizer(lr=1e-5)
        if handle is not None:
            handle.watch({"input_ids": case.ids()})
            handle.before_step(0, 1 << 30)
        if variant == "compiled":
            for layer in layers_of(model):
                layer.compile(dynamic=False)
        ids = case.ids()
        forms[f"{name}/{variant}"] = Form(model=model, optimizer=optimizer, ids=ids, handle=handle, fast=True)
    return forms


def rows_of_steps(
    cases: list[str], *, rounds: int, compiled: bool, experts: int = EXPERTS, active: int = ACTIVE
) -> list[dict[str, Any]]:
    """One row per case and dtype."""
    rows: list[dict[str, Any]] = []
    dtypes = (torch.bfloat16, torch.float32)
    for name in cases:
        case, forms = CASES[name], {}
        config = SSD(experts=experts, active=active, schedule="always_sparse", monitor_every=1 << 40)
        for dtype in dtypes:
            forms |= _forms(case, None, dtype, compiled=compiled) | _forms(case, config, dtype, compiled=compiled)
        steps: dict[str, Step] = {n: f.step for n, f in forms.items()}
        timing = interleave(steps, rounds=rounds, warm_up=2)
        dense = timing.fastest("dense/")
        ideal = case.shape.step_flops(case.tokens, case.seq_len) / case.shape.step_flops(
            case.tokens, case.seq_len, [active / experts] * case.shape.layers
        )
        for dtype in dtypes:
            of = str(dtype).removeprefix("torch.")
            sparse, alike = timing.fastest(f"sparse/{of}"), timing.fastest(f"dense/{of}")
            ratio = timing.ratio(dense, sparse)
            rows.append(
                {
                    "case": name,
                    "dtype": of,
                    "tokens": case.tokens,
                    "experts": experts,
                    "active": active,
                    "share": active / experts,
                    "form": f"E{experts} K{active}, step",
                    "dense_ms": 1e3 * timing.median(dense),
                    "sparse_ms": 1e3 * timing.median(sparse),
                    "ratio": ratio,
                    "ratio_quartiles": timing.spread(dense, sparse),
                    "ratio_same_dtype": timing.ratio(alike, sparse),
                    "ideal": ideal,
                    "efficiency": ratio / ideal,
                    "backend": used().get("expert_ffn", "none"),
                    "dense_form": dense,
                    "sparse_form": sparse,
                    "forms_ms": {n: 1e3 * timing.median(n) for n in timing.seconds},
                    "rounds": rounds,
                }
            )
        del forms, steps
        gc.collect()
    return rows
