"""What chooses the channels of a bank: predictors as tensors, and the exact top-k mask of their scores.

    linear     s = U (V x) + tilt                                a logit (arXiv 2606.10722)
    bilinear   s = |act(U_g (V_g x)) · (U_u (V_u x))| · tilt      ours
    quantized  s = |act(Ŵ_g x̂) · (Ŵ_u x̂)| · tilt                 ours; Ŵ in 2 or 4 bits, x̂ in 8 bits per group (pack.py)
    scores     s is given, computed elsewhere; tilt is added

Of every `bank` consecutive channels the `keep` largest live, ties to the lower index, NaN below everything: always
exactly `keep`. The obvious form, torch.topk per bank, takes no care of ties and about 20 µs per bank of 64 on a CPU.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fallow.errors import ConfigError

Kind = Literal["linear", "bilinear", "quantized", "scores"]
Gate = Literal["one", "smooth"]
KINDS: tuple[Kind, ...] = ("linear", "bilinear", "quantized", "scores")
GATES: tuple[Gate, ...] = ("one", "smooth")
LOGITS = ("linear", "scores")
"""Kinds whose scores are logits: `tilt_F` is added to them, and "smooth" has a meaning."""


class Predictor(NamedTuple):
    """One layer's predictor, as the op takes it.

    kind: what `tensors` are:
        "linear": (V_RD, U_FR), or int8 (V_RD, scale_R, U_FR, scale_F) from `pack_factors`.
        "bilinear": (Vg_RD, Ug_FR, Vu_RD, Uu_FR), or int8 with a scale after each, from `pack_factors`.
        "quantized": (codes, scales) from `pack_quantized`.
        "scores": (scores_TF,), fp32.
    tilt_F: fp32 [F] or None; added to logits (linear, scores), multiplied with magnitudes (bilinear, quantized).
    gate: what survivors are multiplied by: "one", or "smooth", 2·sigmoid(s), which needs logits.
    compensation: (V_RD, U_DR, b_D) in the dtype of x, b fp32, or None: `U (V x) + b` is added to y, in place of what
        the dead channels would have added. (Ours; arXiv 2606.10722 adds nothing.)
    """

    kind: Kind
    tensors: tuple[Tensor, ...]
    tilt_F: Tensor | None = None
    gate: Gate = "one"
    compensation: tuple[Tensor, Tensor, Tensor] | None = None


class Int8Rows(NamedTuple):
    """A weight in 8 bits: row c is `codes_FD[c] · scale_F[c]`. `int8_rows` (pack.py) makes one."""

    codes_FD: Tensor
    """int8 [F, D], -127 to 127."""
    scale_F: Tensor
    """fp32 [F]."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes_FD.shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[F, D]: the weight that it holds, computed in fp32 and rounded once."""
        return (self.codes_FD.float() * self.scale_F[:, None]).to(dtype)


Weight = Tensor | Int8Rows


def tensor_of(w: Weight) -> Tensor:
    """The tensor with an entry per weight."""
    return w.codes_FD if isinstance(w, Int8Rows) else w


def check_bank(channels: int, bank: int, keep: int) -> None:
    """Raises ConfigError where `bank` does not divide the channels or `keep` is no part of it."""
    if bank < 1 or channels % bank:
        raise ConfigError(f"bank_ffn: {channels} channels are no whole number of banks of {bank}; use a divisor")
    if not 1 <= keep <= bank:
        raise ConfigError(f"bank_ffn: keep={keep} of bank={bank}; keep must be 1 to {bank}")


def check_predictor(p: Predictor, tokens: int, width: int, channels: int) -> None:
    """Raises ConfigError where the predictor is malformed or does not fit x [T, D] and F channels."""
    if p.kind not in KINDS:
        raise ConfigError(f"bank_ffn: predictor kind {p.kind!r} is not one of {', '.join(KINDS)}")
    if p.gate not in GATES:
        raise ConfigError(f"bank_ffn: gate {p.gate!r} is not one of {', '.join(GATES)}")
    if p.gate == "smooth" and p.kind not in LOGITS:
        raise ConfigError(f"bank_ffn: gate 'smooth' needs logits, which a {p.kind} predictor has not; use gate 'one'")
    found = [tuple(t.shape) for t in p.tensors]
    if found not in _allowed_shapes(p, tokens, width, channels):
        raise ConfigError(
            f"bank_ffn: {p.kind} predictor of shapes {', '.join(map(str, found))} does not fit width {width} and"
            f" {channels} channels; make it from this layer's weights"
        )
    if p.compensation is not None:
        v, u, b = p.compensation
        if (v.shape[1:], tuple(u.shape), tuple(b.shape)) != ((width,), (width, v.shape[0]), (width,)):
            raise ConfigError(
                f"bank_ffn: compensation of shapes {list(v.shape)}, {list(u.shape)}, {list(b.shape)} does not fit width"
                f" {width}; needed are [R, {width}], [{width}, R] and [{width}]"
            )
    if p.tilt_F is not None and tuple(p.tilt_F.shape) != (channels,):
        raise ConfigError(f"bank_ffn: tilt is {list(p.tilt_F.shape)}; {channels} channels need [{channels}]")


def _allowed_shapes(p: Predictor, T: int, D: int, F: int) -> list[list[tuple[int, ...]]]:
    first = p.tensors[0]
    R = first.shape[0]
    if p.kind == "scores":
        return [[(T, F)]]
    if p.kind == "quantized":
        if first.dim() != 5 or first.shape[3] not in (2, 4):
            return []
        bits, group = first.shape[3], first.shape[4] // 2
        head = (-(-F // 16), -(-D // group), 2)
        return [[(*head, bits, 2 * group), (*head, 16)]]
    times = 1 if p.kind == "linear" else 2
    return [[(R, D), (F, R)] * times, [(R, D), (R,), (F, R), (F,)] * times]
