"""The correctness gate of `fallow bench upcycle`: `bank_ffn` and `bank_mask` against their naive truth, every kind of
predictor and weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.bench.gate import TOLERANCE, relative_error
from fallow.errors import GateError
from fallow.ops import bank_ffn as op
from fallow.ops.bank_ffn import Int8Rows, Predictor, Weight, naive

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_BANK, _KEEP = 32, 7


def check_bank_ffn(*, backend: str | None = None, device: str = "cpu") -> dict[str, float]:
    """Worst relative error of y per dtype of the weights. Raises GateError when one is too large, or a mask differs."""
    g = torch.Generator().manual_seed(12)
    D, channels, R = 88, 192, 24  # ragged on purpose
    worst: dict[str, float] = {}
    for dtype in DTYPES:
        full = [torch.randn(channels, D, generator=g) / D**0.5 for _ in range(3)]
        weights = [_on(op.int8_rows(w) if dtype == torch.int8 else w.to(dtype), device) for w in full]
        for tokens in (1, 3, 20):
            x_TD = torch.randn(tokens, D, generator=g).to(torch.bfloat16 if dtype == torch.int8 else dtype).to(device)
            for how, predictor in _predictors(full, tokens, R, g, device).items():
                options = {"act": "silu", "bank": _BANK, "keep": _KEEP}
                with torch.no_grad():
                    got_TD = op.bank_ffn(x_TD, predictor, *weights, **options, backend=backend)
                name = f"bank_ffn/{op.last_used}"
                want_TD = naive.bank_ffn(x_TD.double(), predictor, *_exact(weights), **options)
                error = relative_error(got_TD, want_TD)
                allowed = TOLERANCE[x_TD.dtype]
                if error > allowed:
                    raise GateError(
                        f"{name}: y differs from naive by {error:.1e} ({dtype}, {how}, {tokens} tokens); {allowed:.0e}"
                        " is allowed; no speed is reported"
                    )
                key = f"{name}/{str(dtype).removeprefix('torch.')}"
                worst[key] = max(worst.get(key, 0.0), error)
    _check_mask(g, device)
    return worst


def _on(w: Weight, device: str) -> Weight:
    return Int8Rows(*(t.to(device) for t in w)) if isinstance(w, Int8Rows) else w.to(device)


def _exact(weights: list[Weight]) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers that the weights hold, in fp64."""
    gate, up, down = (naive.dense(w, torch.float32).double() for w in weights)
    return gate, up, down


def _predictors(full: list[Tensor], tokens: int, R: int, g: torch.Generator, device: str) -> dict[str, Predictor]:
    channels, D = full[0].shape
    tilt_F = torch.rand(channels, generator=g) + 0.5
    pairs = [torch.randn(s, generator=g) / s[1] ** 0.5 for s in ((R, D), (channels, R)) * 2]
    linear, bilinear = Predictor("linear", tuple(pairs[:2]), tilt_F, "smooth"), Predictor("bilinear", tuple(pairs))
    found = {
        "linear": linear,
        "linear int8": op.pack_factors(linear),
        "bilinear": bilinear._replace(tensors=tuple(t.bfloat16() for t in pairs), tilt_F=tilt_F),
        "bilinear int8": op.pack_factors(bilinear),
        "quantized 4-bit": Predictor("quantized", op.pack_quantized(full[0], full[1], bits=4), tilt_F),
        "quantized 2-bit": Predictor("quantized", op.pack_quantized(full[0], full[1], bits=2, group=32), tilt_F),
        "scores": Predictor("scores", (torch.randn(tokens, channels, generator=g),)),
    }
    return {
        how: p._replace(
            tensors=tuple(t.to(device) for t in p.tensors), tilt_F=None if p.tilt_F is None else p.tilt_F.to(device)
        )
        for how, p in found.items()
    }


def _check_mask(g: torch.Generator, device: str) -> None:
    """Few values, so that ties are everywhere, and NaN."""
    scores_TF = torch.randint(-3, 4, (9, 640), generator=g).float()
    scores_TF[scores_TF == -3] = torch.nan
    for bank, keep in ((64, 16), (32, 1), (20, 19)):
        got = op.bank_mask(scores_TF.to(device), bank=bank, keep=keep).cpu()
        if not torch.equal(got, naive.bank_mask(scores_TF, bank=bank, keep=keep)):
            raise GateError(f"bank_mask: {keep} of {bank} differs from a stable sort; no speed is reported")
