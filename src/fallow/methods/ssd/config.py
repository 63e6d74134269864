"""SSD's settings. Every field is validated when the object is made; the message says how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fallow.errors import ConfigError


@dataclass(kw_only=True, slots=True, frozen=True)
class SSD:
    """Switchable sparse-dense learning (Zhang et al., ICML 2024, arXiv 2410.03440). Fields marked *ours* are not the
    paper's, whose thresholds were never published.

    A ReLU FFN trains dense until which of its neurons fire together has settled; its neurons are then sorted into
    `experts` groups of equal size and each token computes `active` of them; then it is dense again, so that the groups
    do not freeze. The weights are the same throughout: a switch only reorders neurons.
    """

    experts: int = 16
    """Groups E that an FFN is cut into; must divide its channels. Few fat experts are fast, many thin ones are not."""

    active: int | tuple[int, ...] = 4
    """Experts k computed per token, 1 <= k <= experts; a tuple gives every layer its own (ours)."""

    schedule: Literal["adaptive", "fixed", "always_sparse", "always_dense"] = "adaptive"
    """When it switches. "adaptive": by `similarity`, `zeros` and `max_gap`, as observed. "fixed" (ours): sparse from
    `dense_start` on. "always_sparse" and "always_dense" are controls."""

    dense_start: float = 0.1
    """Share of the run that is dense in any case at its beginning (not with "always_sparse")."""

    monitor_every: float = 0.02
    """Share of the run between two observations on the fixed held-out batch; 1 or more counts steps."""

    similarity: float = 0.9
    """Dense to sparse: correlation of activation patterns between two observations must exceed this (ours)."""

    zeros: float = 0.8
    """Dense to sparse: share of activations that must be zero (ours)."""

    patience: int = 2
    """Dense to sparse: observations in a row that must agree (ours)."""

    sparse_share: float = 0.2
    """Share of the run that one sparse phase lasts at most; then the partition is made anew after a dense phase
    (ours)."""

    dense_share: float = 0.02
    """Share of the run that a dense phase between two sparse ones lasts at least (ours)."""

    max_gap: float = 0.2
    """Sparse to dense: when the loss computed sparse exceeds the loss computed dense by this many nats (ours)."""

    end: Literal["dense", "mixed"] = "mixed"
    """The last `end_share` of the run: "dense", or "mixed" (ours), where dense and sparse steps alternate, so that the
    weights serve both ways."""

    end_share: float = 0.1
    """Share of the run that the end takes (not with "always_sparse")."""

    partition: Literal["balanced", "random"] | Callable[..., Any] = "balanced"
    """How neurons become experts. "balanced": k-means with equal sizes, from the last partition and from a fresh start,
    the better one kept. "random" is the control. Or a function (features [F, d] of norm 1, experts, generator) ->
    int64 [F], the expert of each neuron, every expert equally often."""

    cluster_by: Literal["activations", "weights"] = "activations"
    """What "balanced" compares: on which tokens of the held-out batch a neuron fires (ours), or its normalised row of
    the gate projection (the paper; also where there is no batch)."""

    router: Literal["centroid", "fitted"] = "fitted"
    """How the router starts at a switch. "centroid": the mean of each expert's rows (the paper's code). "fitted"
    (ours): least squares of each expert's share of the output on the held-out batch; centroids where there is none."""

    router_lr: float = 1.0
    """The router learns in sparse phases at this times the learning rate; 0 leaves it as it started."""

    relu: Literal["require", "swap", "ignore"] = "require"
    """Activations other than ReLU and ReLU². "require": refuse them. "swap": put ReLU in their place (ReLU-fication;
    the model then needs training). "ignore": group smooth neurons as they are; nothing is promised of that."""

    seed: int = 0
    """Seed of fresh starts of the partition, of random partitions and of the neuron pairs compared."""

    def __post_init__(self) -> None:
        if not isinstance(self.experts, int) or isinstance(self.experts, bool) or self.experts < 1:
            raise ConfigError(f"SSD: experts={self.experts!r} must be a positive whole number, such as 16")
        if isinstance(self.active, list):  # from YAML
            object.__setattr__(self, "active", tuple(self.active))
        for k in self.active if isinstance(self.active, tuple) else (self.active,):
            if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= self.experts:
                raise ConfigError(
                    f"SSD: active={k!r} must be a whole number between 1 and experts={self.experts}; a quarter of"
                    " the experts is usual"
                )
        for field, values in (
            ("schedule", ("adaptive", "fixed", "always_sparse", "always_dense")),
            ("end", ("dense", "mixed")),
            ("cluster_by", ("weights", "activations")),
            ("router", ("centroid", "fitted")),
            ("relu", ("require", "swap", "ignore")),
        ):
            if getattr(self, field) not in values:
                raise ConfigError(f"SSD: {field}={getattr(self, field)!r}; use one of {', '.join(map(repr, values))}")
        if not callable(self.partition) and self.partition not in ("balanced", "random"):
            raise ConfigError(f"SSD: partition={self.partition!r}; use 'balanced', 'random' or a function")
        for field in ("dense_start", "zeros", "sparse_share", "dense_share", "end_share"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"SSD: {field}={getattr(self, field)} must lie between 0 and 1")
        if not -1 <= self.similarity <= 1:
            raise ConfigError(f"SSD: similarity={self.similarity} is a correlation: between -1 and 1")
        if self.monitor_every <= 0 or self.patience < 1 or self.max_gap < 0 or self.router_lr < 0:
            raise ConfigError(
                f"SSD: monitor_every={self.monitor_every} must be above 0, patience={self.patience} at least 1,"
                f" max_gap={self.max_gap} and router_lr={self.router_lr} not negative"
            )
