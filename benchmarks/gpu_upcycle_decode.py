"""Whole decoding with Upcycle on a GPU, for benchmarks/gpu_upcycle.py: a step of a stock Llama, dense and sparse.

Models of Qwen2.5-7B's and 1.5B's widths with random weights, bf16, one text of 128 tokens in a cache of 512 places; 16
steps are one timed round, each replayed from a CUDA graph. Dense is the fastest of five forms: the stock step, and
layers compiled (fallow/serving/layered.py) with stock attention, with attention that Inductor fuses, then with one
product for query, key and value, or with products that Inductor fuses. Sparse takes the compiled form that was fastest
for dense, and the stock step. `ideal` is the ratio of bytes that a step reads: weights, predictors and the head. The
target is 1.5 times, 2 the aim. gpu_decode_check.py tells whether a form is right.

Predictors are random: what they choose is no part of the time. Predicted at 3.0 TB/s and 2 µs a launch, 7B: dense 4.7
ms of bytes and 0.8 of launches, sparse with a linear predictor 1.9 and 0.9: 2.0x of 2.5x.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gpu_decode_check import Notes, all_alive, check, distance, first_line, rounding_of
from gpu_timing import Row, Settings, Step, fused_products, graphed, interleave, stopwatch
from gpu_upcycle_gate import switched

if TYPE_CHECKING:
    from torch import Tensor

    from fallow.bench.harness import Timing
    from fallow.bench.steps import Case
    from fallow.serving import Decoder

KINDS = ("linear", "quantized", "bilinear")
BANK, KEEP = 64, 16
PROMPT, STEPS, PLACES = 128, 16, 512
ROUNDS = 12
TARGET = 1.5
WAYS: dict[str, dict[str, Any]] = {
    "compiled": {},
    "compiled-attention": {"attention": "fallow_one_query"},
    "compiled-qkv": {"attention": "fallow_one_query", "merged": True},
    "compiled-fused": {"attention": "fallow_one_query", "backend": fused_products},
}
"""Of making the parts of a step."""


def qwen_7b() -> Case:
    from fallow.bench.flops import Shape
    from fallow.bench.steps import Case

    return Case("decode-7b", Shape(3584, 18944, 28, 4, 128, layers=28, vocab=152064), 1, PROMPT)


def qwen_1_5b() -> Case:
    from fallow.bench.flops import Shape
    from fallow.bench.steps import Case

    return Case("decode-1.5b", Shape(1536, 8960, 12, 2, 128, layers=28, vocab=151936), 1, PROMPT)


def bench_decode(settings: Settings, cases: tuple[Case, ...] = ()) -> Iterator[Row]:
    """One row per case and kind of predictor."""
    import torch

    settings = settings.of(rounds=min(settings.rounds, ROUNDS), warm_up=min(settings.warm_up, 2))
    ways = dict(WAYS)
    core = settings.part == "core"
    if core:
        del ways["compiled"], ways["compiled-fused"]  # never the fastest so far
    for case in cases or ((qwen_7b(),) if core else (qwen_7b(), qwen_1_5b())):
        try:
            yield from bench_case(case, ways, settings)
        except Exception as error:  # another case may do
            print(f"  {case.name}: left out: {first_line(error)}")
        torch._dynamo.reset()
        gc.collect()


def bench_case(case: Case, ways: dict[str, dict[str, Any]], settings: Settings) -> Iterator[Row]:
    """One row per kind of predictor. One dense model and one sparse one are there at a time. Of `ways` the best for
    dense is kept, and is the only one for the next case: compiling takes most of the time."""
    import torch

    notes: dict[str, str] = {}
    with stopwatch(f"{case.name} dense"):
        stock = stock_model(case, settings)
        dense = forms_of("dense", stock, (), settings, ways, notes)
        first = interleave(dense, settings.of(rounds=min(settings.rounds, 5), warm_up=settings.warm_up))
    ranked = sorted(dense, key=first.median)
    print("  " + ", ".join(f"{f} {1e3 * first.median(f) / STEPS:.3f} ms" for f in ranked))
    best = [f.removeprefix("dense/") for f in ranked if f != "dense/stock"][:1]
    for way in [w for w in ways if best and w not in best]:
        del ways[way]
    rivals = {f: dense[f] for f in ranked[:2]}
    for kind in KINDS[:2] if settings.part == "core" else KINDS:
        try:
            with stopwatch(f"{case.name} {kind}"):
                row = bench_kind(case, kind, stock, rivals, ways, notes, settings)
            yield row | {"dense_forms_ms": {f: 1e3 * first.median(f) / STEPS for f in ranked}}
        except Exception as error:  # another kind may do
            print(f"  {case.name} {kind}: left out: {first_line(error)}")
        gc.collect()
        if settings.device != "cpu":
            torch.cuda.empty_cache()


def bench_kind(
    case: Case,
    kind: str,
    stock: Any,
    dense: dict[str, Step],
    ways: dict[str, dict[str, Any]],
    notes: Notes,
    settings: Settings,
) -> Row:
    """One row; `dense` are forms to time beside the sparse ones, which are made in these ways."""
    notes = dict(notes)
    model, handle = sparse_model(stock, kind)
    sparse = forms_of("sparse", model, handle.layers, settings, ways, notes)
    return decode_row(case, kind, interleave(dense | sparse, settings), bytes_read(case, stock, handle), notes)


def stock_model(case: Case, settings: Settings) -> Any:
    """Made where it is to run: on the CPU, drawing the weights of 7B takes minutes."""
    import torch

    from fallow.bench.steps import build

    with torch.device(settings.device):
        return build(case, torch.bfloat16).eval()


def sparse_model(stock: Any, kind: Any) -> tuple[Any, Any]:
    """(a sparse copy, its handle). Factors are drawn: making them from weights takes an eigendecomposition each."""
    import torch

    import fallow

    model = copy.deepcopy(stock)
    handle: Any = fallow.sparsify(model, fallow.Upcycle(bank=BANK, keep=KEEP, predictor=kind, prompts="dense"))
    with torch.no_grad():
        for layer in handle.layers:
            for p in layer.predictor.parameters():
                p.normal_().mul_(p.shape[-1] ** -0.5)
            layer.predictor.started = True
    handle.set_mode("sparse")
    return model, handle


def bytes_read(case: Case, stock: Any, handle: Any) -> dict[str, float]:
    """Of a step: the weights, of FFNs the living rows, the predictors."""
    whole = sum(p.numel() * p.element_size() for p in stock.parameters())  # the head is the embedding
    ffn = 2 * 3 * case.shape.d_model * case.shape.ffn * case.shape.layers
    packed = [t for n in handle.layers for t in (n._serving or n.predictor.packed(n.view.weights())).tensors]
    predictors = sum(t.numel() * t.element_size() for t in packed)
    return {"dense": float(whole), "sparse": whole - ffn * (1 - KEEP / BANK) + predictors}


def forms_of(
    name: str, model: Any, layers: Sequence[Any], settings: Settings, ways: dict[str, dict[str, Any]], notes: Notes
) -> dict[str, Step]:
    """name/WAY -> `STEPS` steps of a text. What cannot be compiled or captured or is wrong is left out, and a line says
    why. `layers`: the sparse ones."""
    import torch

    from fallow.serving import Decoder, layered

    on_gpu = settings.device != "cpu"
    decoder = Decoder(model, max_tokens=PLACES, compiled=False)
    decoder.prefill([1 + i % 200 for i in range(PROMPT)])
    decoder.step(1)  # layers make what they derive from weights, kernels are tuned
    token_11 = torch.ones(1, 1, dtype=torch.long, device=settings.device)
    position_1 = torch.tensor([PROMPT], device=settings.device)
    timed = rounding_of(decoder, PROMPT)
    with all_alive(layers), switched(EARLY=False):
        whole = rounding_of(decoder, PROMPT) if layers else timed
    forms: dict[str, Step] = {}

    def attempt(form: str, make: Callable[[], Step]) -> None:
        try:
            with stopwatch(form):
                forms[form] = make()
        except Exception as error:  # whatever Dynamo, Inductor, Triton or a capture raise
            notes[form] = f"left out: {first_line(error)}"
            print(f"  {form}: {notes[form]}")

    def compiled(form: str, way: dict[str, Any]) -> Step:
        through = layered.parts(**way, compiled=on_gpu)
        merged = layered.merge(model) if way.get("merged") else None
        once = layered.step_of(model, decoder._cache, PLACES, through, token_11, position_1, merged)

        def step() -> Tensor:
            logits_V = once()
            position_1.add_(1)
            return logits_V

        def first() -> Tensor:
            position_1.fill_(PROMPT)
            return step()

        with all_alive(layers):
            check(form, first, whole, notes)
        if not (found := distance(first(), timed.logits_V)) < float("inf"):
            raise RuntimeError("its logits are not numbers")
        if layers:
            print(f"  {form}: as timed {found:.4f}; rounding alone {timed.distance:.4f}")
        replay = graphed(step) if on_gpu else step

        def run() -> None:
            position_1.fill_(PROMPT)
            for token in range(STEPS):
                token_11.fill_(token)
                replay()

        return run

    for way, how in ways.items():
        attempt(f"{name}/{way}", lambda form=f"{name}/{way}", how=how: compiled(form, how))
    attempt(f"{name}/stock", lambda: stock_steps(decoder, token_11, on_gpu))
    return forms


def stock_steps(decoder: Decoder, token_11: Any, on_gpu: bool) -> Step:
    """The model's own step. The cache counts its places in tensors, so a replay moves on by one."""
    import torch

    decoder.length = PLACES
    decoder.rewind(PROMPT)

    @torch.no_grad()
    def one() -> object:
        return decoder._eager(token_11)

    replay = graphed(one) if on_gpu else one

    def run() -> None:
        decoder.length = PLACES
        decoder.rewind(PROMPT)
        for token in range(STEPS):
            token_11.fill_(token)
            replay()

    return run


def decode_row(case: Case, kind: str, timing: Timing, read: dict[str, float], notes: Notes) -> Row:
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
        f" ({dense}): {ratio:.2f}x of {ideal:.2f}x ideal (set: {TARGET}x); "
        + ", ".join(f"{f} {ms:.3f}" for f, ms in row["forms_ms"].items())
    )
    return row
