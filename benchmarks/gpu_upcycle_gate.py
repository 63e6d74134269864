"""The gate of Upcycle's kernels for benchmarks/gpu_upcycle.py: `bank_ffn` on Triton against naive in fp64.

Scores are summed in another order than the truth's, and channels whose scores are equal but for rounding may change
places. So the choice is held to the truth's scores (exactly `keep` of every bank, and nobody left out is better by more
than rounding), and y to naive with that choice given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fallow.ops.bank_ffn import Predictor

KINDS = ("linear", "linear-int8", "bilinear", "bilinear-int8", "quantized-4", "quantized-2", "scores")
KINDS_OF_SEVERAL = ("linear-int8", "quantized-4", "scores")
"""Those timed with more than one token."""
SLACK = 2e-5
"""How much better than a chosen channel one left out may score, as a share of the largest score."""


class Size(NamedTuple):
    D: int
    F: int
    bank: int
    keep: int
    rank: int


SMALL, RAGGED, REAL = Size(40, 64, 16, 4, 6), Size(133, 520, 20, 7, 24), Size(3584, 18944, 64, 16, 256)


def check(device: str, interpreted: bool) -> dict[str, float]:
    """Worst relative error of y per kind of predictor and dtype, and of `bank_mask` (which is exact). Raises
    GateError."""
    import torch

    from fallow.bench.gate import TOLERANCE, relative_error
    from fallow.errors import GateError
    from fallow.ops.activation import ACTIVATIONS
    from fallow.ops.bank_ffn import bank_ffn, bank_mask, int8_rows, naive

    worst = {"bank_mask": 0.0}
    for tokens, bank, keep in ((5, 12, 5), (3, 64, 16)) if interpreted else ((2048, 64, 16), (333, 20, 7)):
        s_TF = _draw((tokens, 12 * bank), 3, torch.float32, device).mul(8).round()  # ties in every bank
        if not torch.equal(
            bank_mask(s_TF, bank=bank, keep=keep, backend="triton"), naive.bank_mask(s_TF, bank=bank, keep=keep)
        ):
            raise GateError(f"bank_mask: banks of {bank} differ from naive; no speed is reported")
    for kind, tokens, size, dtype, int8 in _cases(interpreted):
        x_TD = _draw((tokens, size.D), 1, dtype, device) * size.D**0.5
        floating = [_draw((size.F, size.D), seed, dtype, device) for seed in (2, 3, 4)]
        weights: Any = [int8_rows(w) for w in floating] if int8 else floating
        predictor = make_predictor(kind, size, x_TD, floating[0], floating[1])
        path = f"bank_ffn-{kind}/{str(dtype).removeprefix('torch.')}{'-int8' if int8 else ''}"
        for act in ACTIVATIONS if tokens == 1 and kind == "bilinear" else ("silu",):
            how: dict[str, Any] = {"act": act, "bank": size.bank, "keep": size.keep}
            alive_TF, exact_TF = _choice(path, x_TD, predictor, size, how)
            given = predictor._replace(
                kind="scores", tensors=(torch.where(alive_TF, exact_TF, -torch.inf),), tilt_F=None
            )
            want = naive.bank_ffn(x_TD.double(), given, *(naive.dense(w, torch.float64) for w in weights), **how)
            for form, one in {path: True, path.replace("-", "-pair-", 1): False}.items():
                if not one and (tokens, kind) != (1, "linear-int8"):
                    continue
                with switched(ONE_KERNEL=one):
                    got = bank_ffn(x_TD, predictor, *weights, **how, backend="triton")
                error = relative_error(got, want)
                worst[form] = max(worst.get(form, 0.0), error)
                if error > TOLERANCE[dtype]:
                    raise GateError(
                        f"{form}: y differs from naive by {error:.1e} ({act}, {tokens} tokens, {size});"
                        f" {TOLERANCE[dtype]:.0e} is allowed; no speed is reported"
                    )
    if not interpreted:
        _check_captured(device)
    return worst


def _check_captured(device: str) -> None:
    """A CUDA graph of calls that depend on one another, launches overlapping, gives the bits of calls on their own."""
    import torch
    from gpu_timing import graphed

    from fallow.errors import GateError
    from fallow.ops.bank_ffn import bank_ffn

    for kind, tokens in (("linear-int8", 1), ("quantized-4", 1), ("linear-int8", 2)):
        x_TD = _draw((tokens, REAL.D), 1, torch.bfloat16, device) * REAL.D**0.5
        weights = [_draw((REAL.F, REAL.D), seed, torch.bfloat16, device) for seed in (2, 3, 4)]
        p = make_predictor(kind, REAL, x_TD, weights[0], weights[1])

        def calls(x: Tensor = x_TD, p: Predictor = p, w: Any = weights) -> list[Tensor]:
            found = [x]
            for _ in range(4):
                y = bank_ffn(found[-1], p, *w, act="silu", bank=REAL.bank, keep=REAL.keep, backend="triton")
                found.append(y / y.float().square().mean().sqrt().to(y.dtype))
            return found

        with switched(EARLY=False):
            want = calls()
        held: list[Tensor] = []
        replay = graphed(lambda held=held, calls=calls: held.__setitem__(slice(None), calls()))
        for _ in range(5):
            for t in held[1:]:
                t.fill_(torch.nan)
            replay()
            if not all(torch.equal(a, b) for a, b in zip(held, want, strict=True)):
                raise GateError(f"bank_ffn-{kind}: a CUDA graph of it gives other bits; no speed is reported")


@contextmanager
def switched(**to: bool) -> Iterator[None]:
    """Switches of the Triton backend, set so meanwhile: EARLY, launches overlap; ONE_KERNEL, one for a token's rows."""
    from fallow.ops.bank_ffn import triton

    before = {switch: getattr(triton, switch) for switch in to}
    for switch, on in to.items():
        setattr(triton, switch, on)
    try:
        yield
    finally:
        for switch, on in before.items():
            setattr(triton, switch, on)


def _cases(interpreted: bool) -> Iterator[tuple[str, int, Size, torch.dtype, bool]]:
    """(kind, tokens, size, dtype, whether weights are int8). Every dtype and number of tokens is tuned anew, so on a
    GPU what is timed, and of the rest one each."""
    import torch

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if interpreted:
        for kind in KINDS:
            yield from ((kind, tokens, SMALL, fp32, False) for tokens in (1, 2) if tokens == 1 or "int8" not in kind)
    else:
        yield from ((kind, 1, REAL, bf16, False) for kind in KINDS)
        yield from ((kind, tokens, REAL, bf16, False) for tokens in (2, 4, 8) for kind in KINDS_OF_SEVERAL)
        yield from ((kind, 3, RAGGED, bf16, False) for kind in ("bilinear", "quantized-2"))
    for dtype, tokens, int8 in ((bf16, 1, False), (fp16, 2, False), (fp32, 1, True), (bf16, 2, True)):
        yield ("linear", tokens, SMALL if interpreted else RAGGED, dtype, int8)


def _choice(path: str, x_TD: Tensor, p: Predictor, size: Size, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(who lives by the kernels, the truth's scores in fp64); raises GateError where the choice is wrong."""
    import torch

    from fallow.errors import GateError
    from fallow.ops.bank_ffn import naive, triton

    chosen = triton.choose(x_TD, p, size.F, **how)
    alive_TF = chosen.coef_TF != 0
    exact_TF = naive.scores(x_TD.double(), p, how["act"])[:, : size.F]
    alive, exact = (t.unflatten(1, (-1, size.bank)) for t in (alive_TF, exact_TF))
    if not (alive.sum(2) == size.keep).all():
        raise GateError(f"{path}: a bank has not exactly {size.keep} living channels; no speed is reported")
    ahead = torch.where(alive, -torch.inf, exact).amax(2) - torch.where(alive, exact, torch.inf).amin(2)
    if float(ahead.max()) > SLACK * float(exact.abs().max()):
        raise GateError(f"{path}: a channel left out scores higher by {float(ahead.max()):.1e}; no speed is reported")
    if not torch.equal(chosen.count_N.long(), alive.any(0).sum(1)):
        raise GateError(f"{path}: the lists of living channels are of the wrong length; no speed is reported")
    return alive_TF, exact_TF


def make_predictor(kind: str, size: Size, x_TD: Tensor, w_gate_FD: Tensor, w_up_FD: Tensor) -> Predictor:
    """A predictor with random factors in the dtype of x, or with copies of these weights; never one that fits the
    model, which costs nothing in bytes."""
    import torch

    from fallow.ops.bank_ffn import Predictor, pack_factors, pack_quantized

    device, (base, *how) = str(x_TD.device), kind.split("-")
    tilt_F = _draw((size.F,), 9, torch.float32, device).abs() + 0.1
    if base == "scores":
        return Predictor("scores", (_draw((len(x_TD), size.F), 8, torch.float32, device),), tilt_F)
    if base == "quantized":
        group = 16 if size is SMALL else 64
        return Predictor("quantized", pack_quantized(w_gate_FD, w_up_FD, bits=int(how[0]), group=group), tilt_F)
    pairs = [(size.rank, size.D), (size.F, size.rank)] * (1 if base == "linear" else 2)
    factors = tuple(_draw(shape, 10 + i, x_TD.dtype, device) for i, shape in enumerate(pairs))
    p = Predictor("linear" if base == "linear" else "bilinear", factors, tilt_F)
    return pack_factors(p) if how else p


def _draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    import torch

    g = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=g, device=device) / shape[-1] ** 0.5).to(dtype)
