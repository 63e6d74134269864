"""Which layer is to blame: one layer dense and the rest sparse (restore), and one sparse and the rest dense (mirror).

For every document and layer l, the answer's likelihood is measured with l alone switched. The layers before l then
compute what they computed in the unswitched pass, so their outputs are kept from it and the pass begins at l: half the
work of running every pass from the start, to the bit the same result. Memory: the layers' outputs of one document in
both modes, 2·L·T·D values. Cost: about L full passes per document for both sweeps together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from fallow.errors import ConfigError
from fallow.evaluation import bootstrap
from fallow.evaluation.answers import Answer, answer_nats
from fallow.evaluation.bootstrap import Interval
from fallow.evaluation.subject import Subject
from fallow.method import Mode
from fallow.methods.upcycle.layers import GatedFFN
from fallow.methods.upcycle.method import UpcycleMethod

Say = Callable[[str], None]


def upcycled(subject: Subject, verb: str) -> UpcycleMethod:
    """The subject's method. Raises ConfigError: it has none, or another than Upcycle."""
    if not isinstance(subject.sparsity, UpcycleMethod):
        kind = "dense" if subject.sparsity is None else subject.sparsity.name
        raise ConfigError(
            f"{verb}: {subject.name} is {kind}; this needs a model with predictors: a run of method upcycle, or a plain"
            " model with --method upcycle"
        )
    return subject.sparsity


@dataclass(kw_only=True, slots=True)
class Swept:
    """Mean nats per answer token, one row per document."""

    dense_N: np.ndarray
    sparse_N: np.ndarray
    restored_NL: np.ndarray
    """With layer l dense and all others sparse."""
    alone_NL: np.ndarray
    """With layer l sparse and all others dense."""

    @property
    def recovery_NL(self) -> np.ndarray:
        """Nats that a dense layer l brings back."""
        return self.sparse_N[:, None] - self.restored_NL

    @property
    def damage_NL(self) -> np.ndarray:
        """Nats that a sparse layer l costs."""
        return self.alone_NL - self.dense_N[:, None]

    def of(self, chosen: Sequence[int]) -> Swept:
        """The same of some documents."""
        rows = list(chosen)
        return Swept(
            dense_N=self.dense_N[rows],
            sparse_N=self.sparse_N[rows],
            restored_NL=self.restored_NL[rows],
            alone_NL=self.alone_NL[rows],
        )


@dataclass(kw_only=True, slots=True)
class Ranking:
    """Layers by one sweep."""

    means: list[float]
    """Nats per answer token of each layer."""
    order: list[int]
    """Layers, the leading one first."""
    certainty: float
    """Share of bootstrap draws of the documents in which the leader leads."""
    leader: Interval
    """The leader's nats."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "nats": self.means,
            "order": self.order,
            "certainty": self.certainty,
            "leader": self.order[0],
            "leader_nats": self.leader.as_dict(),
        }


def ranking(values_NL: np.ndarray) -> Ranking:
    """Layers by their mean over documents, and how sure the first place is."""
    means = values_NL.mean(0)
    order = np.argsort(-means, kind="stable")
    drawn = values_NL[bootstrap.resample(len(values_NL))].mean(1)
    return Ranking(
        means=[float(v) for v in means],
        order=[int(v) for v in order],
        certainty=float((drawn.argmax(1) == order[0]).mean()),
        leader=bootstrap.mean(values_NL[:, order[0]].tolist()),
    )


def sweep(subject: Subject, answers: Sequence[Answer], *, say: Say = lambda _: None) -> Swept:
    """Both sweeps over all layers. Raises ConfigError: the subject is not upcycled."""
    handle = upcycled(subject, "diagnose")
    layers, count = handle.layers, len(handle.layers)
    dense, sparse = np.zeros(len(answers)), np.zeros(len(answers))
    restored, alone = np.zeros((len(answers), count)), np.zeros((len(answers), count))
    all_dense: list[Mode] = ["dense"] * count
    all_sparse: list[Mode] = ["sparse"] * count
    with subject.evaluated("sparse") as model:
        for n, answer in enumerate(answers):
            with modes(layers, all_dense):
                dense[n], after_dense = recorded(model, layers, answer)
            with modes(layers, all_sparse):
                sparse[n], after_sparse = recorded(model, layers, answer)
            for place in range(count):
                switched: list[Mode] = [*all_sparse[:place], "dense", *all_sparse[place + 1 :]]
                with modes(layers, switched), beginning_at(layers, place, after_sparse):
                    restored[n, place] = mean_nats(model, answer)
                mirrored: list[Mode] = [*all_dense[:place], "sparse", *all_dense[place + 1 :]]
                with modes(layers, mirrored), beginning_at(layers, place, after_dense):
                    alone[n, place] = mean_nats(model, answer)
            say(f"swept {n + 1} of {len(answers)}: {answer.task} {answer.length}")
    return Swept(dense_N=dense, sparse_N=sparse, restored_NL=restored, alone_NL=alone)


def mean_nats(model: PreTrainedModel, answer: Answer) -> float:
    return float(answer_nats(model, answer).mean())


@contextmanager
def modes(layers: Sequence[GatedFFN], wanted: Sequence[Mode]) -> Iterator[None]:
    """Each layer in a mode of its own; afterwards as before."""
    before: list[Mode] = [layer.mode for layer in layers]
    for layer, mode in zip(layers, wanted, strict=True):
        layer.mode = mode
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.mode = was


def recorded(model: PreTrainedModel, layers: Sequence[GatedFFN], answer: Answer) -> tuple[float, list[Any]]:
    """The answer's mean nats, and what each decoder layer returned on the way."""
    outputs: list[Any] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.view.decoder_layer.register_forward_hook(note).remove)
        return mean_nats(model, answer), outputs


@contextmanager
def beginning_at(layers: Sequence[GatedFFN], place: int, outputs: Sequence[Any]) -> Iterator[None]:
    """Decoder layers before `place` compute nothing: each returns what layer `place - 1` returned in the kept pass."""
    skipped = [layer.view.decoder_layer for layer in layers[:place]]
    for module in skipped:
        module.forward = lambda *_args, **_kwargs: outputs[place - 1]
    try:
        yield
    finally:
        for module in skipped:
            del module.forward
