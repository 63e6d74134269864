"""`fallow bench smet`: one training step, SMET against the fastest dense, per shape and form, with the ideal beside it.

A step is zero_grad, forward, backward and AdamW on 2,048 tokens, the same model in every form: in bf16 with fp32
masters, and in fp32, which some CPUs multiply faster. `ratio` is against the fastest dense form of either dtype,
`ratio_same_dtype` and `step_time` against dense in the row's own. Single weights cost dense's FLOPs, so their ideal is
1: what they save is bytes, printed beside. Tiles are not computed where they are dead, so their ideal is the FLOP
ratio. `layer-…` rows time one linear layer, forward and backward. Topology updates are timed apart, as a share of a
step at the default pace. Nothing is printed when a kernel differs from its naive truth.
"""

from __future__ import annotations

import gc
import time
from itertools import product
from typing import Any

import torch

import fallow
from fallow.bench import block
from fallow.bench.gate import check_smet
from fallow.bench.harness import interleave
from fallow.bench.steps import CASES, Case, Form, build, layers_of
from fallow.errors import ConfigError
from fallow.machine import describe
from fallow.methods.smet import SMET
from fallow.ops import attention as fast_attention
from fallow.ops import used
from fallow.optim import adamw_for

DEFAULT = ("smollm2-135m", "1b-layer")


def _forms(case: Case, config: SMET | None, *, compiled: bool, dtype: torch.dtype) -> dict[str, Form]:
    """The forms of dense (`config` None) or of SMET."""
    name = f"{'dense' if config is None else 'sparse'}/{str(dtype).removeprefix('torch.')}"
    forms: dict[str, Form] = {}
    for variant in ("eager", "compiled") if compiled else ("eager",):
        model = build(case, dtype)
        fast_attention.enable(model)
        handle = None if config is None else fallow.sparsify(model, config)
        optimizer = adamw_for(model, lr=1e-5) if handle is None else handle.optimizer(lr=1e-5)
        if variant == "compiled":
            for layer in layers_of(model):
                layer.compile(dynamic=False)
        shared: dict[str, Any] = {"model": model, "optimizer": optimizer, "ids": case.ids(), "handle": handle}
        forms[f"{name}/{variant}"] = Form(**shared, fast=True)
    return forms


def _ideal(case: Case, config: SMET) -> float:
    """FLOP ratio: 1 for single weights; for tiles only the linear layers shrink."""
    if config.block is None:
        return 1.0
    dense, s = case.shape.step_flops(case.tokens, case.seq_len), case.shape
    scores = 3 * 2 * 2 * case.tokens * (case.seq_len / 2) * s.heads * s.head_dim * s.layers
    head = 3 * 2 * case.tokens * s.d_model * s.vocab
    return dense / (head + scores + config.density * (dense - head - scores))


def _row(case: Case, config: SMET, *, rounds: int, compiled: bool, dtype: torch.dtype) -> dict[str, Any]:
    forms = _forms(case, None, compiled=compiled, dtype=dtype) | _forms(case, config, compiled=compiled, dtype=dtype)
    for other in {torch.bfloat16, torch.float32} - {dtype}:
        forms |= _forms(case, None, compiled=False, dtype=other)
    timing = interleave({n: f.step for n, f in forms.items()}, rounds=rounds, warm_up=2)
    dense, fastest = timing.fastest("dense/"), timing.fastest("sparse/")
    alike = timing.fastest(fastest.replace("sparse/", "dense/").rpartition("/")[0])
    ratio, ideal = timing.ratio(dense, fastest), _ideal(case, config)
    handle = forms[fastest].handle
    update = _update_seconds(forms[fastest])
    memory = handle.memory()  # after an update, so that clocks are there to be counted
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "density": config.density,
        "form": f"block {config.block}" if config.block else config.structure,
        "dense_ms": 1e3 * timing.median(dense),
        "sparse_ms": 1e3 * timing.median(fastest),
        "ratio": ratio,
        "ratio_quartiles": timing.spread(dense, fastest),
        "ideal": ideal,
        "efficiency": ratio / ideal,
        "ratio_same_dtype": timing.ratio(alike, fastest),
        "step_time": 1 / timing.ratio(alike, fastest),
        "state_bytes": memory["ratio"],
        "update_share": update / config.update_every / timing.median(fastest),
        "backend": used().get("block_linear" if config.block else "packed", "none"),
        "dense_form": dense,
        "sparse_form": fastest,
        "rounds": rounds,
        "forms_ms": {name: 1e3 * timing.median(name) for name in timing.seconds},
    }


def _update_seconds(form: Form) -> float:
    """Seconds that one topology update takes, over all layers."""
    every = form.handle.config.update_every
    form.handle.before_step(every - 1, 1 << 30)
    began = time.perf_counter()
    form.handle.after_step(every - 1, 1 << 30)
    return time.perf_counter() - began


def run(
    cases: list[str] | None = None,
    *,
    quick: bool = False,
    densities: tuple[float, ...] = (0.25, 0.5),
    rounds: int | None = None,
    compiled: bool = True,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
) -> dict[str, Any]:
    """All rows as one JSON-ready dict (schema: architecture.md). `break_even` is the density of 64-tiles below which a
    step is faster than dense, per case.

    Raises:
        ConfigError: an unknown case or setting. GateError: a kernel differs from its truth.
    """
    known = [*CASES, "layers"]
    unknown = sorted(set(cases or ()) - set(known))
    if unknown:
        raise ConfigError(f"bench smet: unknown case {', '.join(unknown)}; use {', '.join(known)}")
    gate = check_smet()
    n = rounds or (3 if quick else 8)
    rows = []
    for name in cases or (*DEFAULT, "layers"):
        if name == "layers":
            rows += block.layer_rows(rounds=n, densities=densities)
            continue
        for dtype, density, tile in product(dtypes, densities, (None, 64)):
            config = SMET(density=density, block=tile)
            rows.append(_row(CASES[name], config, rounds=n, compiled=compiled and not quick, dtype=dtype))
            gc.collect()
    return {
        "bench": "smet",
        "machine": describe(),
        "gate": "passed",
        "gate_errors": gate,
        "rows": rows,
        "break_even": break_even(rows),
    }


def break_even(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Per case, the density of tiles at which a step costs as much as dense: the line through the lowest and highest
    density measured, at ratio 1."""
    result: dict[str, float | None] = {}
    tiles = [r for r in rows if "block" in str(r.get("form", "")) or r.get("block")]
    for case in dict.fromkeys(r["case"] for r in tiles):
        points = sorted((r["density"], 1 / r["ratio"]) for r in tiles if r["case"] == case)
        (d0, c0), (d1, c1) = points[0], points[-1]
        slope = (c1 - c0) / (d1 - d0) if d1 > d0 else 0.0
        result[case] = min(1.0, d0 + (1 - c0) / slope) if slope > 0 else None
    return result
