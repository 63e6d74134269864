"""One FFN while decoding: `bank_ffn` with its predictor against the fastest dense form of the same weights' dtype.

Weights are random (speed does not depend on them) and of several layers, read one layer after the other as a model
does; a pass over the layers goes before each timed one. Dense is the fastest of: F.linear eager and compiled, mv,
oneDNN with prepacked weights, `row_linear`, and `bank_ffn` itself keeping every channel; for int8, torch's
_weight_int8pack_mm and `bank_ffn`. Rows of a channel lie side by side, or by themselves (`layouts_ms`; the faster
counts). `ideal` is the ratio of bytes read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fallow.bench.harness import Timing, interleave
from fallow.ops import bank_ffn as op
from fallow.ops.bank_ffn import Int8Rows, Predictor, Weight, bank_ffn
from fallow.ops.row_linear import row_linear


class Shape(NamedTuple):
    """Width D, channels F, rank R of thin predictors, and how many layers take turns."""

    width: int
    channels: int
    rank: int
    layers: int


SHAPES = {
    "ffn-7b": Shape(3584, 18944, 256, 2),
    "ffn-1b": Shape(1536, 8960, 128, 8),
    "ffn-135m": Shape(576, 1536, 64, 30),
}
FORMS = ("linear", "linear int8", "bilinear", "bilinear int8", "quantized 4-bit", "quantized 2-bit")
"""Predictors; "int8": factors as int8 rows."""
DTYPES = (torch.bfloat16, torch.int8)
TOKENS = (1, 2, 4, 8, 16)
BANK = 64
LAYOUTS = ("side by side", "apart")

Layer = tuple[Weight, Weight, Weight]


def rows(
    case: str,
    dtype: torch.dtype,
    *,
    keep: int,
    tokens: tuple[int, ...] = TOKENS,
    forms: tuple[str, ...] = FORMS,
    rounds: int,
    compiled: bool,
) -> list[dict[str, Any]]:
    """One row per number of tokens and predictor, those of equal tokens timed in the same interleaved rounds."""
    shape = SHAPES[case]
    g = torch.Generator().manual_seed(1)
    layers = [_weights(shape, dtype, g) for _ in range(shape.layers)]
    by_layout: dict[str, list[Layer]] = {"side by side": [op.side_by_side(*w) for w in layers], "apart": layers}
    predictors = {form: [_predictor(form, shape, g) for _ in layers] for form in forms}
    found: list[dict[str, Any]] = []
    for T in tokens:
        x_TD = torch.randn(T, shape.width, generator=g).bfloat16()
        steps = _dense_steps(x_TD, layers, dtype, compiled) | _kept_steps(x_TD, by_layout)
        backends: dict[str, str] = {}
        for form in forms:
            for layout in LAYOUTS if T == 1 else LAYOUTS[:1]:
                step = _passes(_sparse(x_TD, keep), list(zip(predictors[form], by_layout[layout], strict=True)))
                steps[f"sparse/{form}/{layout}"] = step
                step()
                backends[form] = op.last_used
        with torch.no_grad():
            timing = interleave(steps, rounds=rounds, prepare=steps)
        for form in forms:
            row = _row(timing, form, predictors[form][0], layers[0], keep, T)
            per_layer = {n: 1e3 * timing.median(n) / shape.layers for n in steps if n.startswith("dense/")}
            row["dense_ms"], row["sparse_ms"] = row["dense_ms"] / shape.layers, row["sparse_ms"] / shape.layers
            row["layouts_ms"] = {n: ms / shape.layers for n, ms in row["layouts_ms"].items()}
            found.append(
                {"case": case, "dtype": str(dtype).removeprefix("torch."), "tokens": T, "rank": shape.rank}
                | row
                | {"backend": backends[form], "dense_forms_ms": per_layer, "rounds": rounds}
            )
    return found


def _row(timing: Timing, form: str, p: Predictor, layer: Layer, keep: int, tokens: int) -> dict[str, Any]:
    """Of whole passes."""
    dense, sparse = timing.fastest("dense/"), timing.fastest(f"sparse/{form}/")
    dense_bytes = op.dense_bytes(layer[1])
    sparse_bytes = op.bytes_read(p, layer[1], bank=BANK, keep=keep, tokens=tokens)
    ratio, ideal = timing.ratio(dense, sparse), dense_bytes / sparse_bytes
    return {
        "form": form,
        "predictor": p.kind,
        "bank": BANK,
        "keep": keep,
        "share": keep / BANK,
        "dense_ms": 1e3 * timing.median(dense),
        "sparse_ms": 1e3 * timing.median(sparse),
        "ratio": ratio,
        "ratio_quartiles": timing.spread(dense, sparse),
        "ideal": ideal,
        "efficiency": ratio / ideal,
        "dense_form": dense,
        "layouts_ms": {
            n.split("/")[2]: 1e3 * timing.median(n) for n in timing.seconds if n.startswith(f"sparse/{form}/")
        },
        "dense_bytes": dense_bytes,
        "sparse_bytes": round(sparse_bytes),
    }


# -- what is timed ----------------------------------------------------------------------------------------------------


def _passes(call: Callable[..., Any], layers: list[Any]) -> Callable[[], None]:
    def step() -> None:
        for layer in layers:
            call(*layer)

    return step


def _sparse(x_TD: Tensor, keep: int) -> Callable[[Predictor, Layer], Tensor]:
    def call(predictor: Predictor, w: Layer) -> Tensor:
        return bank_ffn(x_TD, predictor, *w, act="silu", bank=BANK, keep=keep)

    return call


def _kept_steps(x_TD: Tensor, by_layout: dict[str, list[Layer]]) -> dict[str, Callable[[], None]]:
    """The op as a dense FFN: every channel kept and nothing to predict."""
    if x_TD.shape[0] > op.MOST_TOKENS:
        return {}
    channels = op.tensor_of(by_layout["apart"][0][1]).shape[0]
    every = Predictor("scores", (torch.zeros(x_TD.shape[0], channels),))
    call = _sparse(x_TD, BANK)
    return {f"dense/bank_ffn/{n}": _passes(call, [(every, w) for w in layers]) for n, layers in by_layout.items()}


def _ffn(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, gate, up, down: linear(F.silu(linear(x, gate)) * linear(x, up), down)


def _dense_steps(
    x_TD: Tensor, layers: list[Layer], dtype: torch.dtype, compiled: bool
) -> dict[str, Callable[[], None]]:
    T = x_TD.shape[0]
    if dtype == torch.int8:
        as_given = [(x_TD, gate, up, op.int8_rows(_turned(down))) for gate, up, down in layers]  # type: ignore[arg-type]
        return {"dense/int8pack": _passes(_ffn(_int8_linear), as_given)}
    stock = [(x_TD, gate, up, down.t().contiguous()) for gate, up, down in layers]  # type: ignore[union-attr]
    eager = _ffn(F.linear)
    steps = {"dense/eager": _passes(eager, stock)}
    if compiled:
        steps["dense/compiled"] = _passes(torch.compile(eager, dynamic=False), stock)
    if T == 1:
        steps["dense/mv"] = _passes(_ffn(lambda x, w: torch.mv(w, x)), [(x[0], *w) for x, *w in stock])
    if (packed := _prepacked(stock)) is not None:
        steps["dense/packed"] = _passes(_ffn(_packed_linear), packed)
    if T <= op.MOST_TOKENS:
        steps["dense/row_linear"] = _passes(_by_rows, stock)
    return steps


def _by_rows(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    first, second = row_linear(x, (gate, up), (None, None)).chunk(2, -1)
    return row_linear(F.silu(first) * second, (down,), (None,))


def _int8_linear(x: Tensor, w: Int8Rows) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, w.codes_FD, w.scale_F.bfloat16())


def _turned(w: Int8Rows) -> Tensor:
    return (w.codes_FD.float() * w.scale_F[:, None]).t().contiguous()


def _prepacked(stock: list[Any]) -> list[Any] | None:
    """Weights in oneDNN's own blocks, as a frozen graph has them; None without oneDNN's bf16."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    pack = torch.ops.mkldnn._reorder_linear_weight
    return [(x, *(pack(w, x.shape[0]) for w in weights)) for x, *weights in stock]


def _packed_linear(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


# -- random layers ----------------------------------------------------------------------------------------------------


def _weights(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Layer:
    size = (shape.channels, shape.width)

    def one() -> Weight:
        if dtype == torch.int8:
            scale_F = torch.full((shape.channels,), shape.width**-0.5 / 64)
            return Int8Rows(torch.randint(-127, 128, size, generator=g, dtype=torch.int8), scale_F)
        return torch.empty(size, dtype=dtype).normal_(0, shape.width**-0.5, generator=g)

    return one(), one(), one()


def _predictor(form: str, shape: Shape, g: torch.Generator) -> Predictor:
    kind, *how = form.split()
    tilt_F = torch.rand(shape.channels, generator=g)
    if kind == "quantized":
        bits, group = int(how[0][0]), 64
        head = (-(-shape.channels // 16), -(-shape.width // group), 2)
        codes = torch.randint(0, 256, (*head, bits, 2 * group), generator=g, dtype=torch.uint8)
        return Predictor("quantized", (codes, torch.full((*head, 16), 0.01, dtype=torch.bfloat16)), tilt_F)
    pair = ((shape.rank, shape.width), (shape.channels, shape.rank))
    drawn = [torch.randn(s, generator=g).bfloat16() / s[1] ** 0.5 for s in pair * (1 if kind == "linear" else 2)]
    p = Predictor("linear" if kind == "linear" else "bilinear", tuple(drawn), tilt_F)
    return op.pack_factors(p) if how else p
