"""SMET's settings. Every field is validated when the object is made; the message says how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fallow.errors import ConfigError


@dataclass(kw_only=True, slots=True, frozen=True)
class SMET:
    """Sparse memory-efficient training (Xiao et al., ICML 2026, arXiv 2606.00888). Fields marked *ours* are not the
    paper's.

    The linear layers of the blocks hold `density` of their weights, and gradients, moments and clocks of those only;
    embeddings, head and norms stay dense. The controls of the paper are settings of the same class, at any density:

        static     SMET(update_every=0, lr_exponent=0)
        SET        SMET(local_clock=False, warmup_steps=0, lr_exponent=0)
        RigL       SMET(growth="gradient", local_clock=False, warmup_steps=0, lr_exponent=0)
        SET+reset  SMET(lr_exponent=0)
    """

    density: float = 0.25
    """Share of weights alive, 0 < density <= 1, over all sparse layers together."""

    distribution: Literal["uniform", "erk"] = "uniform"
    """"uniform" gives every layer `density`; "erk" (Erdős-Rényi kernel) gives a layer a density in proportion to
    (out + in) / (out · in), so that small layers are denser."""

    structure: Literal["fan_in", "unstructured"] = "fan_in"
    """"fan_in" (ours): every output has equally many inputs, and drops and grows as many as the others, so that shards
    are even. "unstructured" is the paper's: any entries of the layer."""

    block: int | None = None
    """Side of square tiles that live and die as one (ours), e.g. 64; inactive tiles are not computed. None: single
    weights."""

    update_every: int = 100
    """Optimizer steps between two updates of the topology; 0 never moves it."""

    update_fraction: float = 0.2
    """Share of active weights replaced at an update: those of smallest magnitude."""

    fraction_schedule: Literal["constant", "cosine"] = "constant"
    """"constant" (paper), or "cosine" from `update_fraction` to `final_fraction` at the end of the run (its code)."""

    final_fraction: float = 0.005
    """Where the cosine ends."""

    stop_at: float = 1.0
    """Share of the run after which the topology rests (1: the paper's). The last step never moves it."""

    growth: Literal["random", "gradient"] = "random"
    """New weights: uniformly at random (paper), or where the gradient of the last micro-batch is largest (RigL)."""

    local_clock: bool = True
    """Adam's bias correction counts a weight's own steps since it was born. Off: the run's steps, as in plain SET."""

    warmup_steps: int = 10
    """Steps over which the update of a newborn weight ramps up linearly; 0 for none. Needs `local_clock`."""

    lr_exponent: float = 0.5
    """Learning rate of the sparse layers is lr · density^-lr_exponent (the paper's text ½, its code 1)."""

    init: Literal["random", "magnitude"] = "random"
    """First topology: at random, or the largest weights of the model given (to convert a trained one)."""

    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Optimizer state of sparse layers. "fp32": moments, and masters of bf16 weights. "bf16" (ours): moments in bf16,
    bf16 weights without a master, both rounded stochastically."""

    seed: int = 0
    """Seed of the first topology, of growth and of stochastic rounding; drawn anew from (seed, update, layer)."""

    def __post_init__(self) -> None:
        d = self.density
        if isinstance(d, bool) or not isinstance(d, int | float) or not 0 < d <= 1:
            raise ConfigError(f"SMET: density={d!r} must be a share with 0 < density <= 1 (0.25 keeps a quarter)")
        for field, values in (
            ("distribution", ("uniform", "erk")),
            ("structure", ("fan_in", "unstructured")),
            ("fraction_schedule", ("constant", "cosine")),
            ("growth", ("random", "gradient")),
            ("init", ("random", "magnitude")),
            ("state_dtype", ("fp32", "bf16")),
        ):
            if getattr(self, field) not in values:
                raise ConfigError(f"SMET: {field}={getattr(self, field)!r}; use one of {', '.join(map(repr, values))}")
        if self.block is not None and (self.block < 16 or self.block % 16):
            raise ConfigError(f"SMET: block={self.block} must be a multiple of 16 (64 is fastest), or None")
        for field in ("update_fraction", "final_fraction", "stop_at"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"SMET: {field}={getattr(self, field)} must lie between 0 and 1")
        for field in ("update_every", "warmup_steps", "lr_exponent"):
            if getattr(self, field) < 0:
                raise ConfigError(f"SMET: {field}={getattr(self, field)} must not be negative")
        if self.warmup_steps and not self.local_clock:
            raise ConfigError(
                "SMET: warmup_steps counts a weight's own steps, so without local_clock it has no effect; use"
                " warmup_steps=0"
            )
