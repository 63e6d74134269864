"""Upcycle on a GPU, for benchmarks/gpu_all.py: decoding with the channels a predictor keeps, against dense decoding.

The FFN at 3584×18944 (7B), bf16, 1 to 8 tokens, 16 channels of every 64 alive; every form, dense ones too, is replayed
from a CUDA graph over several layers' weights, so that no form finds its weights in the L2 cache and none waits for
Python. Dense is the fastest of torch's, Inductor's (three ways), and our own kernels with all channels
alive. Tokens choose independently here, the worst case for several. `ideal` is the ratio of bytes; `predicted_ms` is
bytes at 3.0 TB/s, what an H100 copies at, and 2 µs a launch: of one token dense 142 µs, linear-int8 44 (of which thin
product 2, choice 4, rows 36, sum 2), bilinear-int8 46, quantized-4 66, quantized-2 55. The target for one token is 2.2
times the fastest dense form, 3 the aim; gpu_upcycle_decode.py times whole decoding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gpu_decode_check import first_line
from gpu_timing import Row, Settings, Step, compile_options, fused_products, graphed, interleave, stopwatch
from gpu_upcycle_decode import bench_decode
from gpu_upcycle_gate import KINDS_OF_SEVERAL, REAL, Size, check, make_predictor, switched

if TYPE_CHECKING:
    from torch import Tensor

    from fallow.bench.harness import Timing
    from fallow.ops.bank_ffn import Predictor

KINDS = ("linear-int8", "bilinear-int8", "quantized-4", "quantized-2", "scores")
"""Factors in int8, as bf16 models serve them."""
TOKENS = (1, 2, 4, 8)
PARTS = ("ffn", "decode", "core")
"""The FFN, whole decoding, and of both what decides: without the slowest forms, the smaller model and a predictor."""
LAYERS = 4
TARGET = 2.2
BYTES_PER_SECOND, SECONDS_PER_LAUNCH = 3.0e12, 2e-6


def gate_upcycle(device: str, interpreted: bool) -> dict[str, float]:
    """Worst relative error per kind of predictor and dtype. Raises GateError. Where kernels are wrong only when they
    overlap, they do not from here on, and a line says so."""
    from fallow.errors import GateError
    from fallow.ops.bank_ffn import triton

    try:
        return check(device, interpreted)
    except (GateError, RuntimeError) as error:
        if interpreted or not triton.EARLY:
            raise
        print(f"  with overlapping launches: {first_line(error)}; once more without them")
        triton.EARLY = False
        return check(device, interpreted)


def bench_upcycle(settings: Settings) -> Iterator[Row]:
    """The FFN for every number of tokens, then whole decoding."""
    import torch

    for tokens in () if settings.part == "decode" else TOKENS:
        try:
            with stopwatch(f"FFN, {tokens} tokens"):
                rows = bench_ffn(REAL, tokens, settings)
            yield from rows
        except Exception as error:  # another number of tokens may do
            print(f"  FFN, {tokens} tokens: left out: {first_line(error)}")
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    if settings.part != "ffn":
        yield from bench_decode(settings)


def bench_ffn(size: Size, tokens: int, settings: Settings) -> list[Row]:
    """One row per kind of predictor; "scores" is without one: what choosing freely would give."""
    forms, read = ffn_forms(size, tokens, settings)
    captured: dict[str, Step] = {}
    for name, step in forms.items():
        try:
            with stopwatch(f"{name}, {tokens} tokens"):
                captured[name] = graphed(step)
        except Exception as error:  # whatever Inductor, Triton or a capture raise
            print(f"  {name}, {tokens} tokens: left out: {first_line(error)}")
    read = {kind: n for kind, n in read.items() if {f"sparse/{kind}", f"choose/{kind}"} <= captured.keys()}
    return ffn_rows(size, tokens, interleave(captured, settings), read)


def ffn_forms(size: Size, tokens: int, settings: Settings) -> tuple[dict[str, Step], dict[str, float]]:
    """(name -> a step of `LAYERS` layers, kind -> bytes a layer reads): dense/…, sparse/KIND, choose/KIND; late/KIND is
    sparse without overlapping launches, pair/KIND with two kernels for the rows."""
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
    options = compile_options(settings)
    if tokens == 1 and settings.max_autotune and settings.part != "core":
        options["dense/fused"] = {"dynamic": False, "backend": fused_products}
    if tokens > 1:
        options.pop("dense/max-autotune", None)
    forms: dict[str, Step] = {
        name: each(torch.compile(dense, **how) if how else dense, stock) for name, how in options.items()
    }
    if tokens == 1:
        forms["dense/rows"] = each(all_rows(x_TD, size), [tuple(w) for w in layers])
    how: dict[str, Any] = {"act": "silu", "bank": size.bank, "keep": size.keep}
    read: dict[str, float] = {}
    for kind in KINDS if tokens == 1 else KINDS_OF_SEVERAL:
        predictors = [make_predictor(kind, size, x_TD, gate, up) for gate, up, _ in layers]
        rows = int(triton.choose(x_TD, predictors[0], size.F, **how).count_N.sum())
        read[kind] = 3 * rows * size.D * 2 + _bytes(predictors[0])

        def sparse(p: Predictor, *weights: Tensor) -> Tensor:
            return bank_ffn(x_TD, p, *weights, **how, backend="triton")

        def choose(p: Predictor) -> object:
            return triton.choose(x_TD, p, size.F, **how)

        given = [(p, *w) for p, w in zip(predictors, layers, strict=True)]
        forms[f"sparse/{kind}"] = each(sparse, given)
        forms[f"choose/{kind}"] = each(choose, [(p,) for p in predictors])
        if tokens == 1 and kind == "linear-int8":
            forms[f"late/{kind}"] = under(each(sparse, given), EARLY=False)
            forms[f"pair/{kind}"] = under(each(sparse, given), ONE_KERNEL=False)
    return forms, read


def all_rows(x_TD: Tensor, size: Size) -> Callable[..., Tensor]:
    """The dense FFN of one token by the kernels that read living rows: all live."""
    import torch

    from fallow.ops.bank_ffn import triton

    live = torch.arange(size.F, dtype=torch.int32, device=x_TD.device).view(-1, size.bank)
    chosen = triton.Chosen(torch.ones(1, size.F, device=x_TD.device), live, torch.full_like(live[:, 0], size.bank))

    def run(*weights: Tensor) -> Tensor:
        y_TD = torch.empty_like(x_TD)
        triton._living_rows(x_TD, chosen, (weights[0], weights[1], weights[2]), "silu", y_TD)
        return y_TD

    return run


def under(step: Step, **switches: bool) -> Step:
    """The step with the Triton backend's switches set so."""

    def run() -> object:
        with switched(**switches):
            return step()

    return run


def _bytes(p: Predictor) -> int:
    """What a predictor reads; given scores are no part of it."""
    return 0 if p.kind == "scores" else sum(t.numel() * t.element_size() for t in p.tensors)


def ffn_rows(size: Size, tokens: int, timing: Timing, read: dict[str, float]) -> list[Row]:
    dense, whole = timing.fastest("dense/"), 3 * size.F * size.D * 2
    case = f"ffn-{size.D}x{size.F}"
    rows: list[Row] = []
    for kind, bytes_read in read.items():
        form = f"sparse/{kind}"
        launches = 5 - (kind == "scores") - (tokens == 1)
        ratio, seconds = timing.ratio(dense, form), timing.median(form) / LAYERS
        row: dict[str, Any] = {
            "case": case,
            "dtype": "bfloat16",
            "tokens": tokens,
            "predictor": kind,
            "rank": size.rank if "linear" in kind else None,
            "bank": size.bank,
            "keep": size.keep,
            "dense_ms": 1e3 * timing.median(dense) / LAYERS,
            "sparse_ms": 1e3 * seconds,
            "choose_ms": 1e3 * timing.median(f"choose/{kind}") / LAYERS,
            "predicted_ms": 1e3 * (bytes_read / BYTES_PER_SECOND + launches * SECONDS_PER_LAUNCH),
            **{
                f"{how}_ms": 1e3 * timing.median(by) / LAYERS if (by := f"{how}/{kind}") in timing.seconds else None
                for how in ("late", "pair")
            },
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
            f"  {case} T {tokens} {kind:13} {row['sparse_ms']:7.4f} ms ({row['choose_ms']:.4f} to choose; predicted"
            f" {row['predicted_ms']:.4f}), dense {row['dense_ms']:7.4f} ms ({dense}): {ratio:.2f}x of"
            f" {row['ideal']:.2f}x ideal{aimed}"
        )
        rows.append(row)
    if rows:
        print("  dense: " + ", ".join(f"{f} {ms:.4f} ms" for f, ms in rows[0]["dense_forms_ms"].items()))
        for how, said in {"late": "without overlap", "pair": "two kernels for rows"}.items():
            for r in (r for r in rows if r[f"{how}_ms"]):
                print(f"  {r['predictor']}, {said}: {r[f'{how}_ms']:.4f} ms")
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
