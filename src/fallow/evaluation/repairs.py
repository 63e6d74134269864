"""The five repairs of one layer, cheapest first; all other layers stay as they are.

    keep      more channels in this layer: no learning, but it reads more (the density exception)
    tilt      one number per channel added to its logit: F numbers, learnt in seconds
    refit     the predictor begun anew on long text, then fitted to what the channels contribute there
    finetune  FFN and predictor trained so that the sparse output is what the dense one was
    lm        FFN and predictor trained on the language model's loss, briefly

What they learn from is plain text at the lengths that failed, never RULER's prompts: those judge. Inputs of the layer
are taken from the sparse model, as it will be served, by a pass that ends at the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fallow.evaluation.snapshot import Snapshot, copy_of, weights_of
from fallow.evaluation.subject import Subject
from fallow.evaluation.sweeps import Say, upcycled
from fallow.methods.upcycle.layers import GatedFFN
from fallow.methods.upcycle.learning import in_bank_cross_entropy
from fallow.methods.upcycle.looking import report
from fallow.methods.upcycle.predictors import contribution, target_logits
from fallow.optim import AdamW

NAMES = ("keep", "tilt", "refit", "finetune", "lm")
TILT_LR = 0.1
"""Learning rate of a bias: logits differ by a few units."""
TINY = 1e-20
FITTED = 8192
"""Tokens from which closed forms are fitted."""
HELD = 8
"""One in so many tokens of the text is not learnt from and says how well the predictor finds channels."""


@dataclass(kw_only=True, slots=True)
class Workshop:
    """One layer, and text to learn from."""

    subject: Subject
    place: int
    windows_NT: Tensor
    """int64: long text."""
    steps: int = 100
    """Optimizer steps of each repair that learns."""
    rows: int = 512
    """Tokens per step."""
    lr: float = 1e-4
    """Of weights."""
    seed: int = 0
    x_TD: Tensor = field(init=False)
    """The layer's inputs on the text, in the sparse model."""
    chance: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.x_TD = inputs_of(self.subject, self.place, self.windows_NT)
        self.chance = torch.Generator().manual_seed(self.seed)

    @property
    def layer(self) -> GatedFFN:
        return upcycled(self.subject, "repair").layers[self.place]

    @property
    def held_TD(self) -> Tensor:
        return self.x_TD[::HELD][:2048]

    def draw(self) -> Tensor:
        """[rows, D]: inputs to learn from."""
        index = torch.randint(len(self.x_TD), (self.rows,), generator=self.chance)
        index = torch.where(index % HELD == 0, (index + 1).clamp_max(len(self.x_TD) - 1), index)
        return self.x_TD[index.to(self.x_TD.device)]

    @torch.no_grad()
    def recall(self) -> float:
        """Share of the best channels' contribution that the layer's choice finds, on held-out text."""
        return report(self.layer, self.held_TD)["recall"]


class _Enough(Exception):
    """The layer has its inputs: the rest of the pass is not needed."""


def inputs_of(subject: Subject, place: int, windows_NT: Tensor) -> Tensor:
    """[T, D]: what reaches the layer's FFN while all layers are sparse."""
    layer = upcycled(subject, "repair").layers[place]
    seen: list[Tensor] = []

    def note(_layer: GatedFFN, x_TD: Tensor) -> None:
        seen.append(x_TD.detach().clone())
        raise _Enough

    before = layer.observer
    layer.observer = note
    try:
        with subject.evaluated("sparse") as model:
            for window_T in windows_NT:
                try:
                    model(input_ids=window_T[None].to(model.device), use_cache=False)
                except _Enough:
                    continue
    finally:
        layer.observer = before
    return torch.cat(seen)


@dataclass(kw_only=True, slots=True)
class Repair:
    """One way to mend a layer."""

    name: str
    """Of `NAMES`."""
    what: str
    """In words."""
    run: Callable[[Workshop], None]
    refused: str = ""
    """Why it cannot be done to this layer."""


def ways(layer: GatedFFN, chosen: tuple[str, ...], keeps: list[int]) -> list[Repair]:
    """The repairs asked for, cheapest first."""
    found: list[Repair] = []
    for keep in keeps:
        found.append(
            Repair(name="keep", what=f"keep {keep} of {layer.bank}", run=lambda shop, keep=keep: more(shop, keep))
        )
    found.append(Repair(name="tilt", what="a bias per channel", run=tilt))
    fixed = "" if layer.predictor.scoring() else f"a {layer.predictor.kind} predictor has nothing to fit"
    found.append(Repair(name="refit", what="the predictor fitted anew on long text", run=refit, refused=fixed))
    found.append(Repair(name="finetune", what="FFN and predictor trained to the dense output", run=finetune))
    found.append(Repair(name="lm", what="FFN and predictor trained on the text", run=lm))
    return [repair for repair in found if repair.name in chosen]


def more(shop: Workshop, keep: int) -> None:
    """Keep more channels of every bank."""
    shop.layer.keep = keep
    shop.layer.stale()
    shop.layer.compensate(shop.x_TD[:FITTED])


def tilt(shop: Workshop) -> None:
    """A bias per channel on the logit: what its logits miss on average, then learnt by the in-bank cross entropy."""
    layer = shop.layer
    w = layer.view.weights()
    bias_F = _missing(shop).requires_grad_(True)
    optimizer = torch.optim.Adam([bias_F], lr=TILT_LR)
    for step in range(shop.steps):
        x = shop.draw()
        with torch.no_grad():
            scores_TF = _logits(layer, x)
            target_TF = contribution(x, w, layer.view.act, layer.config)
        with torch.enable_grad():
            loss = in_bank_cross_entropy(scores_TF + bias_F, target_TF, layer.bank)
            optimizer.zero_grad()
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = TILT_LR * (1 - step / shop.steps)
        optimizer.step()
    with torch.no_grad():
        if layer.predictor.kind == "linear":
            layer.predictor.tilt_F.add_(bias_F.detach())
        else:  # the logit is a magnitude's logarithm
            layer.predictor.tilt_F.mul_(bias_F.detach().exp())
    layer.stale()
    layer.compensate(shop.x_TD[:FITTED])


def _logits(layer: GatedFFN, x_TD: Tensor) -> Tensor:
    """fp32 [T, F]; a quantized predictor gives magnitudes, whose logarithm it is."""
    scores_TF = layer.predictor.logits(x_TD, layer.view.weights()).float()
    return (scores_TF + TINY).log() if layer.predictor.kind == "quantized" else scores_TF


@torch.no_grad()
def _missing(shop: Workshop) -> Tensor:
    """fp32 [F]: by how much each channel's logit is too low on average, against its bank."""
    layer = shop.layer
    w, bank = layer.view.weights(), layer.bank
    total_F = torch.zeros(layer.view.n_channels, device=shop.x_TD.device)
    chunks = shop.x_TD[:FITTED].split(shop.rows)
    for x in chunks:
        scores = _logits(layer, x).unflatten(1, (-1, bank))
        wanted_TF = target_logits(contribution(x, w, layer.view.act, layer.config), bank)
        total_F += (wanted_TF - (scores - scores.mean(2, keepdim=True)).flatten(1)).mean(0)
    return total_F / len(chunks)


def refit(shop: Workshop) -> None:
    """The predictor begun from the weights and the inputs seen, then fitted; the better of both by recall is kept."""
    layer = shop.layer
    w = layer.view.weights()
    layer.predictor.start(w, shop.x_TD[:FITTED])
    begun, state = shop.recall(), copy_of(layer.predictor)
    rate = layer.config.fit_lr
    optimizer = torch.optim.AdamW(layer.predictor.scoring(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(shop.steps):
        x = shop.draw()
        target_TF = contribution(x, w, layer.view.act, layer.config)
        with torch.enable_grad():
            loss = in_bank_cross_entropy(layer.predictor.logits(x, w), target_TF, layer.bank)
            optimizer.zero_grad()
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / shop.steps)
        optimizer.step()
        layer.stale()
    if shop.recall() < begun:
        layer.predictor.load_state_dict(state)
    for p in layer.predictor.parameters():
        p.grad = None
    layer.stale()
    layer.compensate(shop.x_TD[:FITTED])


def finetune(shop: Workshop) -> None:
    """FFN and predictor: the sparse output as near as it goes to what the dense FFN gave before the repair."""
    layer = shop.layer
    with torch.no_grad():
        wanted = [(x, layer.view.dense(x)) for x in (shop.draw() for _ in range(shop.steps))]
    with _learning(shop) as optimizer:
        for step, (x, y_TD) in enumerate(wanted):
            layer.sparse = True
            distance = (layer.forward(x).float() - y_TD.float()).square().sum() / y_TD.float().square().sum()
            _step(optimizer, distance, shop, step)


def lm(shop: Workshop) -> None:
    """FFN and predictor: the language model's own loss on long text, everything else frozen and sparse as it is."""
    model = shop.subject.model
    length = min(shop.windows_NT.shape[1], 1024)
    texts_NT = shop.windows_NT[:, : shop.windows_NT.shape[1] // length * length].reshape(-1, length)
    with shop.subject.evaluated("sparse"), _learning(shop) as optimizer:
        steps = max(1, shop.steps // 4)
        for step in range(steps):
            index = int(torch.randint(len(texts_NT), (), generator=shop.chance))
            ids_BT = texts_NT[index][None].to(model.device)
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            _step(optimizer, loss, shop, step * shop.steps // steps)


@contextmanager
def _learning(shop: Workshop) -> Iterator[AdamW]:
    """An optimizer of one layer's weights and predictor, with gradients for nothing else."""
    layer, model = shop.layer, shop.subject.model
    asked = [(p, p.requires_grad) for p in model.parameters()]
    sparse = layer.sparse
    own, stand_in = weights_of(layer), layer.predictor.compensation
    groups: list[dict[str, Any]] = [{"params": own + (list(stand_in.parameters()) if stand_in else [])}]
    if scoring := layer.predictor.scoring():
        groups.append({"params": scoring, "lr": layer.config.fit_lr})
    try:
        model.requires_grad_(False)
        for p in own:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield AdamW(groups, lr=shop.lr, weight_decay=0.0)
    finally:
        layer.sparse = sparse
        for p, wanted in asked:
            p.requires_grad_(wanted)
            p.grad = None
        for p in layer.predictor.parameters():
            p.grad = None
        layer.stale()


def _step(optimizer: AdamW, loss: Tensor, shop: Workshop, step: int) -> None:
    optimizer.zero_grad()
    loss.backward()
    share = min(1.0, 10 * (step + 1) / shop.steps) * (1 - step / shop.steps)
    for group, rate in zip(optimizer.param_groups, (shop.lr, shop.layer.config.fit_lr), strict=False):
        group["lr"] = rate * share
    optimizer.step()
    shop.layer.stale()


__all__ = ["NAMES", "Repair", "Say", "Snapshot", "Workshop", "inputs_of", "ways"]
