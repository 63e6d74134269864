"""Whole decoding with Upcycle on a GPU, for benchmarks/gpu_upcycle.py: fallow's serving loop, dense and sparse.

A stock model of Qwen2.5-1.5B's widths with random weights, bf16, one text; 16 steps of `Decoder` are one timed round.
Every model is timed three ways (eagerly, compiled as the decoder does it, and as a CUDA graph of the eager step), and
the fastest way of either counts. `ideal` is the ratio of bytes that a step reads: weights, predictors and the head. The
target is 1.5 times, 2 the aim.
"""

from __future__ import annotations

import copy
import gc
from itertools import product
from typing import TYPE_CHECKING, Any

from gpu_timing import Row, Settings, Step, graphed, interleave

if TYPE_CHECKING:
    from fallow.bench.harness import Timing
    from fallow.bench.steps import Case
    from fallow.serving import Decoder

KINDS = ("linear", "bilinear", "quantized")
BANK, KEEP = 64, 16
PROMPT, STEPS, PLACES = 128, 16, 2048
TARGET = 1.5


def qwen_1_5b() -> Case:
    from fallow.bench.flops import Shape
    from fallow.bench.steps import Case

    return Case("decode-1.5b", Shape(1536, 8960, 12, 2, 128, layers=28, vocab=151936), 1, PROMPT)


def bench_decode(settings: Settings, case: Case | None = None) -> list[Row]:
    """One row per kind of predictor. Three models at a time would fit; one sparse model at a time leaves room."""
    import torch

    case = case or qwen_1_5b()
    rows: list[Row] = []
    for kind in KINDS:
        forms, read, notes = decode_forms(case, kind, settings)
        rows.append(decode_row(case, kind, interleave(forms, settings), read, notes))
        forms.clear()
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def decode_forms(
    case: Case, kind: Any, settings: Settings, *, compiled: bool = True
) -> tuple[dict[str, Step], dict[str, float], dict[str, str]]:
    """(name -> `STEPS` steps of a text, "dense" and "sparse" -> bytes of a step, form -> what its decoder says)."""
    import torch

    import fallow
    from fallow.bench.steps import build
    from fallow.serving import Decoder

    stock: Any = build(case, torch.bfloat16)
    stock = stock.to(settings.device).eval()
    model = copy.deepcopy(stock)
    handle: Any = fallow.sparsify(model, fallow.Upcycle(bank=BANK, keep=KEEP, predictor=kind))
    handle.set_mode("sparse")
    whole = sum(p.numel() * p.element_size() for p in stock.parameters())
    ffn = 2 * 3 * case.shape.d_model * case.shape.ffn * case.shape.layers
    forms: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for how, (name, each) in product(
        ("eager", "compiled", "graphed") if compiled else ("eager",), (("dense", stock), ("sparse", model))
    ):
        form = f"{name}/{how}"
        decoder = Decoder(each, max_tokens=PLACES, compiled=how == "compiled")
        start(decoder)
        notes[form] = decoder.note
        try:
            forms[form] = graphed_steps(decoder) if how == "graphed" else steps(decoder)
        except RuntimeError as error:  # something in the stock model's step cannot be captured
            notes[form] = f"left out: {str(error).strip().splitlines()[0]}"
            print(f"  {form}: {notes[form]}")
    parts = [t for n in handle.layers for t in n.predictor.packed(n.view.weights()).tensors]
    predictors = sum(t.numel() * t.element_size() for t in parts)
    read = {"dense": float(whole), "sparse": whole - ffn * (1 - KEEP / BANK) + predictors}
    return forms, read, notes


def start(decoder: Decoder) -> None:
    """A prompt, a step in which layers make what they derive from weights and kernels are tuned, one that compiles."""
    decoder.prefill([1 + i % 200 for i in range(PROMPT)])
    for token in (1, 2):
        decoder.step(token)


def steps(decoder: Decoder) -> Step:
    def run() -> None:
        if decoder.length + STEPS > PLACES:
            start(decoder)
        for token in range(STEPS):
            decoder.step(token)

    return run


def graphed_steps(decoder: Decoder) -> Step:
    """The eager step as a CUDA graph. Places of the cache are counted in tensors, so a replay moves on by one."""
    import torch

    token_11 = torch.zeros(1, 1, dtype=torch.long, device=decoder.model.device)

    @torch.no_grad()
    def one() -> object:
        decoder.length += 1
        return decoder._eager(token_11)

    replay = graphed(one)

    def run() -> None:
        if decoder.length + STEPS > PLACES:
            start(decoder)
        for token in range(STEPS):
            token_11.fill_(token)
            replay()
        decoder.length += STEPS

    return run


def decode_row(case: Case, kind: str, timing: Timing, read: dict[str, float], notes: dict[str, str]) -> Row:
    from fallow.ops import bank_ffn

    dense, sparse = timing.fastest("dense/"), timing.fastest("sparse/")
    ratio, ideal = timing.ratio(dense, sparse), read["dense"] / read["sparse"]
    row: dict[str, Any] = {
        "case": case.name,
        "dtype": "bfloat16",
        "predictor": kind,
        "bank": BANK,
        "keep": KEEP,
        "dense_ms": 1e3 * timing.median(dense) / STEPS,
        "sparse_ms": 1e3 * timing.median(sparse) / STEPS,
        "ratio": ratio,
        "ratio_quartiles": timing.spread(dense, sparse),
        "ideal": ideal,
        "efficiency": ratio / ideal,
        "megabytes": {n: b / 1e6 for n, b in read.items()},
        "backend": bank_ffn.last_used,
        "dense_form": dense,
        "sparse_form": sparse,
        "forms_ms": {f: 1e3 * timing.median(f) / STEPS for f in timing.seconds},
        "notes": notes,
    }
    print(
        f"  {case.name} {kind:9} {row['sparse_ms']:7.3f} ms a token ({sparse}), dense {row['dense_ms']:7.3f} ms"
        f" ({dense}): {ratio:.2f}x of {ideal:.2f}x ideal (set: {TARGET}x)"
    )
    return row
