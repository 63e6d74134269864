"""Why one layer fails: what brings the answers back when only that layer is changed, all others sparse as they are.

    dense        the whole layer: what there is to win
    oracle       the truly best `keep` channels: the predictor's error
    keep 24, 32  more channels, chosen as before: capacity
    scale        the layer's output times the factor that fits it best: calibration
    gate one     survivors not multiplied by the gate: calibration, of smooth gates

Per channel: how much of what the best channels contribute is missed, and whether few channels miss most of it, which a
bias per channel would mend. Nothing is learnt here: the documents are looked at, and every change is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fallow.evaluation import bootstrap
from fallow.evaluation.answers import CLASSES, Answer, answer_nats
from fallow.evaluation.subject import Subject
from fallow.evaluation.sweeps import Say, beginning_at, modes, recorded, upcycled
from fallow.method import Mode
from fallow.methods.upcycle.layers import GatedFFN
from fallow.methods.upcycle.predictors import judged
from fallow.ops import bank_ffn

HALF = 0.5
"""A change that brings back this share of what a dense layer does names the cause."""


@contextmanager
def changed(layer: GatedFFN, **values: Any) -> Iterator[None]:
    """Attributes of a layer set for a block of code, and what serving derived from them dropped."""
    before = {name: getattr(layer, name) for name in values}
    for name, value in values.items():
        setattr(layer, name, value)
    layer.stale()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(layer, name, value)
        layer.stale()


def larger_keeps(layer: GatedFFN) -> list[int]:
    """Half as many channels again, and twice as many, where the bank has them."""
    return sorted({k for k in (layer.keep * 3 // 2, layer.keep * 2) if layer.keep < k < layer.bank})


def causes(subject: Subject, answers: Sequence[Answer], place: int, *, say: Say = lambda _: None) -> dict[str, Any]:
    """What helps layer `place`, in nats per answer token and as a share of what a dense layer brings back.

    Returns:
        JSON: `changes` (name -> `nats` with interval, `share`), `classes` (gap of the layer by class of token),
        `channels` (what of the best channels is missed), `scale`, `cause` and `why`.
    """
    layers = upcycled(subject, "diagnose").layers
    layer = layers[place]
    channels = _Channels()
    nats: dict[str, list[Tensor]] = {}
    as_they_are: list[Mode] = ["sparse"] * len(layers)
    with subject.evaluated("sparse") as model:
        for answer in answers:
            with modes(layers, as_they_are):
                with _observing(layer, channels):
                    _, outputs = recorded(model, layers, answer)
                with beginning_at(layers, place, outputs):
                    nats.setdefault("as it is", []).append(answer_nats(model, answer))
                    for name, change in _changes(layer, model, channels):
                        with change():
                            nats.setdefault(name, []).append(answer_nats(model, answer))
            say(f"causes: {answer.task} {answer.length}")
    found = {name: [float(n.mean()) for n in kept] for name, kept in nats.items()}
    now, dense = np.array(found["as it is"]), np.array(found["dense"])
    whole = float((now - dense).mean())
    changes = {
        name: {
            "nats": bootstrap.difference(found["as it is"], kept).as_dict(),
            "share": float((now - np.array(kept)).mean()) / whole if whole > 0 else 0.0,
        }
        for name, kept in found.items()
        if name != "as it is"
    }
    cause, why = _verdict(changes, layer)
    return {
        "layer": place,
        "changes": changes,
        "classes": _by_class(answers, nats["as it is"], nats["dense"]),
        "channels": channels.as_dict(),
        "scale": channels.scale,
        "cause": cause,
        "why": why,
    }


def _changes(layer: GatedFFN, model: PreTrainedModel, channels: _Channels) -> list[tuple[str, Callable[[], Any]]]:
    found: list[tuple[str, Callable[[], Any]]] = [
        ("dense", lambda: changed(layer, mode="dense")),
        ("oracle", lambda: changed(layer, selection="oracle")),
    ]
    found += [(f"keep {keep}", lambda keep=keep: changed(layer, keep=keep)) for keep in larger_keeps(layer)]
    found.append(("scale", lambda: _scaled(layer, model, channels.scale)))
    if layer.config.gate == "smooth":
        found.append(("gate one", lambda: changed(layer, config=replace(layer.config, gate="hard"))))
    return found


@contextmanager
def _scaled(layer: GatedFFN, model: PreTrainedModel, factor: float) -> Iterator[None]:
    """The FFN's output times a factor."""

    def scale(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output * factor

    hook = model.get_submodule(layer.view.name).register_forward_hook(scale)
    try:
        yield
    finally:
        hook.remove()


def _verdict(changes: dict[str, dict[str, Any]], layer: GatedFFN) -> tuple[str, str]:
    """(cause, a sentence)."""
    share = {name: found["share"] for name, found in changes.items()}
    keeps = [name for name in share if name.startswith("keep ")]
    if not changes["dense"]["nats"]["low"] > 0:
        return "unclear", "even a dense layer brings nothing back, so this layer alone is not the cause"
    if share["oracle"] >= HALF:
        best = f"the best {layer.keep} of {layer.bank} channels bring back {share['oracle']:.0%} of what a dense layer"
        return "predictor", f"{best} does, so the predictor picks the wrong ones"
    if keeps and share[keeps[-1]] >= HALF:
        return (
            "capacity",
            f"{keeps[-1]} brings back {share[keeps[-1]]:.0%} and better choice does not: too few channels",
        )
    if max(share["scale"], share.get("gate one", 0.0)) >= HALF:
        return (
            "calibration",
            f"a factor on its output brings back {share['scale']:.0%}: its size is off, not its choice",
        )
    return (
        "unclear",
        "neither better choice, more channels nor another scale brings back half of what a dense layer does",
    )


def _by_class(answers: Sequence[Answer], now: Sequence[Tensor], dense: Sequence[Tensor]) -> dict[str, Any]:
    """Nats per token that the layer costs, by class of answer token."""
    found: dict[str, Any] = {}
    for name in CLASSES:
        rows = [(a - b)[[c == name for c in x.classes]] for x, a, b in zip(answers, now, dense, strict=True)]
        kept = [(float(r.sum()), len(r)) for r in rows if len(r)]
        if kept:
            interval = bootstrap.ratio([k[0] for k in kept], [k[1] for k in kept])
            found[name] = {"nats": interval.as_dict(), "tokens": sum(k[1] for k in kept)}
    return found


class _Channels:
    """What the layer's choice misses, summed over the tokens seen, and the factor that fits its output best."""

    def __init__(self) -> None:
        self.missed_F: Tensor | None = None
        self.best = self.product = self.square = 0.0

    @property
    def scale(self) -> float:
        return self.product / self.square if self.square > 0 else 1.0

    def see(self, layer: GatedFFN, x_TD: Tensor) -> None:
        w = layer.view.weights()
        for x in x_TD.split(512):
            h_TF = layer.hidden(x, w)
            size_TF = judged(h_TF, w, layer.config)
            best_TF = bank_ffn.bank_mask(size_TF, bank=layer.bank, keep=layer.keep)
            coefficient_TF = layer.coefficient(x, h_TF, w).to(h_TF.dtype)
            missed_F = (size_TF * (best_TF & (coefficient_TF == 0))).sum(0)
            self.missed_F = missed_F if self.missed_F is None else self.missed_F + missed_F
            self.best += float((size_TF * best_TF).sum())
            whole, part = (torch.nn.functional.linear(h, w.w_down_DF).float() for h in (h_TF, h_TF * coefficient_TF))
            self.product += float((whole * part).sum())
            self.square += float(part.square().sum())

    def as_dict(self) -> dict[str, Any]:
        """`missed`: share of the best channels' contribution; `top`: share of that in the worst twentieth of them."""
        if self.missed_F is None or not self.best:
            return {}
        ordered = self.missed_F.sort(descending=True)
        few = max(1, len(self.missed_F) // 20)
        total = float(self.missed_F.sum())
        return {
            "missed": total / self.best,
            "top": float(ordered.values[:few].sum()) / total if total else 0.0,
            "even": few / len(self.missed_F),
            "worst": ordered.indices[:8].tolist(),
        }


@contextmanager
def _observing(layer: GatedFFN, channels: _Channels) -> Iterator[None]:
    before = layer.observer
    layer.observer = channels.see
    try:
        yield
    finally:
        layer.observer = before
