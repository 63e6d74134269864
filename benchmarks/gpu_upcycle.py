"""Upcycle on a GPU, for benchmarks/gpu_all.py: decoding with the channels a predictor keeps, against dense decoding.

The FFN at 3584×18944 (7B), bf16, 1 to 8 tokens, 16 channels of every 64 alive; every form, dense eager and compiled
ones too, is replayed from a CUDA graph over several layers' weights, so that no form finds its weights in the L2 cache
and none waits for Python. Tokens choose independently here, the worst case for several. `ideal` is the ratio of bytes.
The target for one token is 2.2 times the fastest dense form, 3 the aim; gpu_upcycle_decode.py times whole decoding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gpu_timing import Row, Settings, Step, compile_options, graphed, interleave
from gpu_upcycle_decode import bench_decode
from gpu_upcycle_gate import REAL, Size, make_predictor
from gpu_upcycle_gate import gate_upcycle as gate_upcycle

if TYPE_CHECKING:
    from torch import Tensor

    from fallow.bench.harness import Timing
    from fallow.ops.bank_ffn import Predictor

KINDS = ("linear", "bilinear", "quantized-4", "quantized-2", "scores")
TOKENS = (1, 2, 4, 8)
LAYERS = 4
TARGET = 2.2


def bench_upcycle(settings: Settings) -> list[Row]:
    """The FFN for every number of tokens, then whole decoding."""
    import torch

    rows: list[Row] = []
    for tokens in TOKENS:
        rows += bench_ffn(REAL, tokens, settings)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows + bench_decode(settings)


def bench_ffn(size: Size, tokens: int, settings: Settings) -> list[Row]:
    """One row per kind of predictor; "scores" is without one: what choosing freely would give."""
    forms, read = ffn_forms(size, tokens, settings)
    timing = interleave({name: graphed(step) for name, step in forms.items()}, settings)
    return ffn_rows(size, tokens, timing, read)


def ffn_forms(size: Size, tokens: int, settings: Settings) -> tuple[dict[str, Step], dict[str, float]]:
    """(name -> a step of `LAYERS` layers, kind -> bytes a layer reads): dense/…, sparse/KIND, choose/KIND."""
    import torch
    import torch.nn.functional as F

    from fallow.ops.bank_ffn import bank_ffn, triton

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, device=settings.device) / shape[-1] ** 0.5).bfloat16()

    x_TD = draw(tokens, size.D) * size.D**0.5
    layers = [[draw(size.F, size.D) for _ in range(3)] for _ in range(LAYERS)]

    def dense(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down_DF: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down_DF)

    def each(run: Callable[..., object], arguments: list[tuple[Any, ...]]) -> Step:
        @torch.no_grad()
        def step() -> object:
            return [run(*a) for a in arguments]

        return step

    stock = [(x_TD, gate, up, down.t().contiguous()) for gate, up, down in layers]
    forms: dict[str, Step] = {
        name: each(torch.compile(dense, **options) if options else dense, stock)
        for name, options in compile_options(settings).items()
    }
    how: dict[str, Any] = {"act": "silu", "bank": size.bank, "keep": size.keep}
    read: dict[str, float] = {}
    for kind in KINDS:
        predictors = [make_predictor(kind, size, x_TD, gate, up) for gate, up, _ in layers]
        rows = int(triton.choose(x_TD, predictors[0], size.F, **how).count_N.sum())
        read[kind] = 3 * rows * size.D * 2 + _bytes(predictors[0])

        def sparse(p: Predictor, *weights: Tensor) -> Tensor:
            return bank_ffn(x_TD, p, *weights, **how, backend="triton")

        def choose(p: Predictor) -> object:
            return triton.choose(x_TD, p, size.F, **how)

        forms[f"sparse/{kind}"] = each(sparse, [(p, *w) for p, w in zip(predictors, layers, strict=True)])
        forms[f"choose/{kind}"] = each(choose, [(p,) for p in predictors])
    return forms, read


def _bytes(p: Predictor) -> int:
    """What a predictor reads; given scores are no part of it."""
    return 0 if p.kind == "scores" else sum(t.numel() * t.element_size() for t in p.tensors)


def ffn_rows(size: Size, tokens: int, timing: Timing, read: dict[str, float]) -> list[Row]:
    dense, whole = timing.fastest("dense/"), 3 * size.F * size.D * 2
    case = f"ffn-{size.D}x{size.F}"
    rows: list[Row] = []
    for kind, bytes_read in read.items():
        form = f"sparse/{kind}"
        ratio, seconds = timing.ratio(dense, form), timing.median(form) / LAYERS
        row: dict[str, Any] = {
            "case": case,
            "dtype": "bfloat16",
            "tokens": tokens,
            "predictor": kind,
            "rank": size.rank if kind in ("linear", "bilinear") else None,
            "bank": size.bank,
            "keep": size.keep,
            "dense_ms": 1e3 * timing.median(dense) / LAYERS,
            "sparse_ms": 1e3 * seconds,
            "choose_ms": 1e3 * timing.median(f"choose/{kind}") / LAYERS,
            "ratio": ratio,
            "ratio_quartiles": timing.spread(dense, form),
            "ideal": whole / bytes_read,
            "efficiency": ratio * bytes_read / whole,
            "megabytes": bytes_read / 1e6,
            "gigabytes_per_second": bytes_read / seconds / 1e9,
            "backend": "triton",
            "dense_form": dense,
            "dense_gigabytes_per_second": whole * LAYERS / timing.median(dense) / 1e9,
            "dense_forms_ms": {f: 1e3 * timing.median(f) / LAYERS for f in timing.seconds if f.startswith("dense/")},
        }
        aimed = f" (set: {TARGET}x)" if tokens == 1 and kind != "scores" else ""
        print(
            f"  {case} T {tokens} {kind:11} {row['sparse_ms']:7.4f} ms ({row['choose_ms']:.4f} to choose),"
            f" dense {row['dense_ms']:7.4f} ms ({dense}): {ratio:.2f}x of {row['ideal']:.2f}x ideal{aimed}"
        )
        rows.append(row)
    return rows


def break_even_by_form(rows: list[Row]) -> dict[str, float | None]:
    """The number of tokens at which a form costs as much as dense, per case and predictor: between two measured numbers
    on the line through them, the largest measured where it is always faster, None where it never is."""
    found: dict[str, float | None] = {}
    for case, kind in dict.fromkeys((r["case"], r["predictor"]) for r in rows if "tokens" in r):
        points = sorted((r["tokens"], 1 / r["ratio"]) for r in rows if (r["case"], r["predictor"]) == (case, kind))
        crossing = None if points[0][1] > 1 else float(points[-1][0])
        for (t0, c0), (t1, c1) in pairwise(points):
            if c0 <= 1 < c1:
                crossing = t0 + (t1 - t0) * (1 - c0) / (c1 - c0)
                break
        found[f"{case}/{kind}"] = crossing
    return found
