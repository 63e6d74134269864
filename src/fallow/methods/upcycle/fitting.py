"""First stage: predictors are fitted to the activations of the frozen model, all layers from the same passes.

A pass over a batch brings every layer its inputs; there its predictor takes one step of AdamW on the in-bank cross
entropy (`learning.py`). Nothing is stored: activations of a few million tokens would fill a disk. Cost: a dense forward
pass and three times the predictors' FLOPs per token. Then compensations, which have a closed form, are fitted to what
the predictors leave out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.errors import DataError
from fallow.methods.upcycle.compensation import Moments
from fallow.methods.upcycle.config import Upcycle
from fallow.methods.upcycle.layers import GatedFFN, Observer
from fallow.methods.upcycle.learning import in_bank_cross_entropy
from fallow.methods.upcycle.looking import Look, report
from fallow.methods.upcycle.predictors import contribution
from fallow.shards import reshard

RECORDS = 10
"""Records of progress per fit."""
WARM_UP = 0.05
COMPENSATION_TOKENS = 16_384


class Fitter:
    """Fits the predictors of these layers; the others stay as they are."""

    def __init__(self, watch: Look, layers: Sequence[GatedFFN], config: Upcycle) -> None:
        self.watch, self.model, self.layers, self.config = watch, watch.model, layers, config
        self.optimizers = {
            layer.number: torch.optim.AdamW(layer.predictor.scoring(), lr=config.fit_lr, betas=(0.9, 0.95))
            for layer in layers
        }

    def run(self, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Any]]:
        """Fit on `fit_tokens` tokens of these batches; yields loss and recall by layer now and then and at the end.

        Raises:
            DataError: the batches end before.
        """
        seen, told, wanted = 0, 0, self.config.fit_tokens
        stream = iter(batches)
        while seen < wanted:
            batch = next(stream, None)
            if batch is None:
                raise DataError(f"fit_tokens={wanted:,} and the data end after {seen:,}; lower it or add data")
            last = seen + batch["input_ids"].numel() >= wanted
            telling = last or seen >= told * wanted / RECORDS
            told += telling
            record = self._step({k: v.to(self.model.device) for k, v in batch.items()}, seen / wanted, telling)
            seen += batch["input_ids"].numel()
            if telling:
                yield {"tokens": seen} | record

    def _step(self, batch: dict[str, Tensor], progress: float, telling: bool) -> dict[str, list[float]]:
        """One batch: a step for every layer."""
        rate = self.config.fit_lr * min(1.0, (progress + 1e-3) / WARM_UP) * (1 + math.cos(math.pi * progress)) / 2
        found: dict[str, list[float]] = {"loss": [], "recall": []} if telling else {}

        def fit(layer: GatedFFN, x_TD: Tensor) -> None:
            if layer.number not in self.optimizers:
                return
            w, optimizer = layer.view.weights(), self.optimizers[layer.number]
            target_TF = contribution(x_TD, w, layer.view.act, self.config)
            if telling:  # before the step, hence on tokens it has not seen
                found["recall"].append(report(layer, x_TD)["recall"])
            with torch.enable_grad():
                loss = in_bank_cross_entropy(layer.predictor.logits(x_TD, w), target_TF, layer.bank)
                optimizer.zero_grad()
                loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            layer.stale()
            if telling:
                found["loss"].append(float(loss))

        _pass(self.watch, batch, fit)
        return found


def fit_compensation(watch: Look, batches: Iterable[dict[str, Tensor]]) -> None:
    """Fit every layer's compensation to `COMPENSATION_TOKENS` tokens of these batches, or to all that there are."""
    moments = [Moments() for _ in watch.layers]

    def add(layer: GatedFFN, x_TD: Tensor) -> None:
        if not layer.predictor.started:
            layer.predictor.start(layer.view.weights(), x_TD)
        moments[layer.number].add(x_TD, layer.missing(x_TD))

    seen = 0
    for batch in batches:
        _pass(watch, {k: v.to(watch.model.device) for k, v in batch.items()}, add)
        seen += batch["input_ids"].numel()
        if seen >= COMPENSATION_TOKENS:
            break
    for layer, found in zip(watch.layers, moments, strict=True):
        if found.tokens and layer.predictor.compensation is not None:
            layer.predictor.compensation.take(found)


def _pass(watch: Look, batch: dict[str, Tensor], observer: Observer) -> None:
    """Show the dense model a batch. The head is not needed: the last position alone, where others can be left out."""
    inputs: dict[str, Any] = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids", "attention_mask")}
    if "logits_to_keep" in inspect.signature(watch.model.forward).parameters:
        inputs["logits_to_keep"] = 1
    with watch.passing(observer=observer):
        watch.model(**inputs, use_cache=False)
    reshard(watch.model)
