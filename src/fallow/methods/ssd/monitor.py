"""What SSD looks at: one forward pass of a fixed held-out batch, whose activations are summed up as it goes.

Similarity compares *which neurons fire together*: phi coefficients (correlations of on and off) of all pairs among 128
neurons a layer, then the correlation of those numbers between two observations. Neurons are known by their number at
the beginning, so a switch in between does not matter. Nothing [T, F] outlives its layer. Cost: a forward pass of the
batch, and one product [128, T] × [T, 128] a layer; a second pass when a partition is there, for the loss computed
sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fallow.methods.ssd.layers import ExpertFFN
from fallow.methods.ssd.router import mass, recall, route

SAMPLED = 128
"""Neurons per layer whose pairs are compared."""
MOST_KEPT = 64
"""Patterns of so many observations are kept for the comparison with the end, 16 KB a layer each."""


@dataclass(slots=True)
class LayerReport:
    """One layer, at one observation."""

    zeros: float
    """Share of activations that are zero."""
    dead: float
    """Share of neurons that fired for no token of the batch."""
    similarity: float | None = None
    """Correlation of phi coefficients with the observation before."""
    recall: float | None = None
    """Share of the output mass that the router's experts hold."""
    oracle: float | None = None
    """The same for the best k experts of each token."""


@dataclass(slots=True)
class Patterns:
    """Which neurons of one layer fire together, at every observation so far."""

    neurons_P: Tensor
    """int64: numbers of the sampled neurons."""
    seen: list[Tensor] = field(default_factory=list)
    """fp16 [P (P - 1) / 2] each: correlations of all pairs. At most `MOST_KEPT`, the first and the last among them."""
    at: list[int] = field(default_factory=list)
    """Which observation each is of."""

    def add(self, pairs: Tensor, observation: int) -> None:
        if len(self.seen) >= MOST_KEPT:
            self.seen, self.at = self.seen[::2], self.at[::2]
        self.seen.append(pairs.half())
        self.at.append(observation)


@dataclass(slots=True)
class Watcher:
    """Sums up the activations of every layer during one forward pass.

    Args:
        patterns: one per layer; what is seen is added.
        observation: its number.
    """

    patterns: list[Patterns]
    observation: int
    reports: list[LayerReport] = field(default_factory=list)

    def __call__(self, layer: ExpertFFN, x_TD: Tensor) -> None:
        number = len(self.reports)
        fire_TF, h_TF = layer.hidden(x_TD)
        report = LayerReport(zeros=1 - float(fire_TF.float().mean()), dead=1 - float(fire_TF.any(0).float().mean()))
        place_F = torch.empty_like(layer.ids)
        place_F[layer.ids] = torch.arange(layer.ids.numel(), device=layer.ids.device)
        known = self.patterns[number]
        pairs = pair_correlations(fire_TF[:, place_F[known.neurons_P.to(place_F.device)]])
        if known.seen:
            report.similarity = correlation(pairs, known.seen[-1])
        known.add(pairs, self.observation)
        if layer.partitioned:
            mass_TE = mass(h_TF, down_norms(layer), layer.n_experts)
            choice_Tk, _ = route(x_TD, layer.router, layer.active)
            report.recall, report.oracle = recall(choice_Tk, mass_TE)
        self.reports.append(report)


def pair_correlations(fire_TP: Tensor) -> Tensor:
    """fp32 [P (P - 1) / 2]: phi coefficient, the correlation of on and off, of every pair; 0 where a neuron is always
    on or always off."""
    centred_TP = fire_TP.float()
    centred_TP = centred_TP - centred_TP.mean(0)
    norm_P = centred_TP.norm(dim=0)
    unit_TP = torch.where(norm_P > 0, centred_TP / norm_P.clamp_min(1e-12), 0.0)
    pairs_PP = unit_TP.t() @ unit_TP
    row, column = torch.triu_indices(pairs_PP.shape[0], pairs_PP.shape[0], 1, device=pairs_PP.device)
    return pairs_PP[row, column]


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of two vectors; 0 where one is constant."""
    a, b = a.float() - a.float().mean(), b.float() - b.float().mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def down_norms(layer: ExpertFFN) -> Tensor:
    """fp32 [F]: norms of the output weights."""
    return layer.view.weights().w_down_DF.float().norm(dim=0)


def sampled_neurons(n_channels: int, g: torch.Generator) -> Tensor:
    """int64 [P]: numbers of the neurons whose pairs are compared, in order."""
    return torch.randperm(n_channels, generator=g)[:SAMPLED].sort().values


def mean_of(reports: list[LayerReport], what: Callable[[LayerReport], float | None]) -> float | None:
    """Mean over the layers that have it."""
    values = [v for v in map(what, reports) if v is not None]
    return sum(values) / len(values) if values else None
