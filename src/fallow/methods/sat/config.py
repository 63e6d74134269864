"""SAT's settings. Every field is validated when the object is made; the message says how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fallow.errors import ConfigError

IMPORTANCES = ("uniform", "magnitude", "wanda", "maxip", "activation")


@dataclass(kw_only=True, slots=True, frozen=True)
class SAT:
    """Sparsity-accelerated training (Ma et al., ACL Findings 2024, arXiv 2406.01392). Fields marked *ours* are not
    the paper's.

    The defaults are the form that came nearest to dense at equal seconds on a small model (docs/results/sat.md). The
    paper's own form is `SAT(omit=0.5, heads=0.5, omit_in="forward+backward")`: far faster steps, and a far higher loss.
    """

    omit: float = 0.75
    """Omission rate of FFN channels, 0 ≤ omit < 1, averaged over the layers. Kept channels are rounded to whole tiles
    of 64."""

    heads: float = 0.0
    """Omission rate of attention heads, 0 ≤ heads < 1, averaged over the layers (whole heads, so layers differ by
    one)."""

    layer_rates: Literal["uniform", "late", "sensitivity"] | Sequence[float] = "uniform"
    """How `omit` and `heads` spread over the layers (ours): equally; linearly rising, from 0 in the first layer; by
    each layer's measured
    loss increase on the first training batch; or one relative weight per layer. The mean stays what was asked for."""

    importance: str | Callable[..., object] = "activation"
    """Score of a channel or head: "uniform" (random), "magnitude", "wanda", "maxip", "activation" (ours: RMS of the
    activation times
    the norm of its output weights), or a callable with the contract of `importance.Importance`."""

    selection: Literal["topk", "sample"] = "topk"
    """Keep the highest scores, or draw without replacement in proportion to them (paper, §3)."""

    scope: Literal["batch", "sequence"] = "batch"
    """One choice of channels per optimizer step, or one per sequence (ours). Heads are always chosen per step."""

    head_unit: Literal["group", "query"] = "group"
    """Under grouped-query attention: omit whole KV groups, or equally many query heads in every group."""

    omit_in: Literal["forward+backward", "backward", "weight_grad"] = "weight_grad"
    """"forward+backward" is the paper's. "backward" (ours) computes every channel forward, so the loss is exact, and
    lets gradient through the kept channels only, saving only their activations. "weight_grad" (ours) lets it through
    all of them and leaves out the weight gradients of omitted channels: what is learned is exact, only fewer weights
    learn at a time."""

    dense_tokens: Literal["loss"] | None = None
    """"loss": tokens that bear loss pass through every channel, only the others (prompts) are sparse (after
    SparseLoRA)."""

    refresh_every: int = 4
    """Optimizer steps between two choices of channels and heads (ours; the paper chooses every step)."""

    sample_tokens: int = 128
    """Tokens of the batch that the scores are computed on (ours)."""

    ladder: int = 4
    """Rungs of the ladder: after a constant phase the rate falls in this many equal steps to 0 (paper). 0 keeps it
    constant."""

    dense_share: float = 0.05
    """Length of each rung as a share of the run, the last of them dense; the constant phase is what remains."""

    lazy: bool = False
    """Freeze weight, moments, decay and step count of omitted rows in the optimizer (ours), instead of letting
    momentum run on."""

    seed: int = 0
    """Seed of "uniform" and "sample"; drawn anew from (seed, step, layer), so that a resumed run repeats it."""

    def __post_init__(self) -> None:
        for field in ("omit", "heads"):
            rate = getattr(self, field)
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
                raise ConfigError(f"SAT: {field}={rate!r} must be a rate with 0 <= {field} < 1 (0.5 omits half)")
        if isinstance(self.importance, str) and self.importance not in IMPORTANCES:
            raise ConfigError(
                f"SAT: unknown importance {self.importance!r}; use {', '.join(IMPORTANCES)} or a callable"
            )
        if not isinstance(self.importance, str) and not callable(self.importance):
            raise ConfigError(f"SAT: importance must be a name or a callable, not {type(self.importance).__name__}")
        self._one_of("selection", ("topk", "sample"))
        self._one_of("scope", ("batch", "sequence"))
        self._one_of("head_unit", ("group", "query"))
        self._one_of("omit_in", ("forward+backward", "backward", "weight_grad"))
        self._one_of("dense_tokens", (None, "loss"))
        if isinstance(self.layer_rates, str):
            self._one_of("layer_rates", ("uniform", "late", "sensitivity"))
        elif not self.layer_rates or min(self.layer_rates) < 0 or max(self.layer_rates) == 0:
            raise ConfigError("SAT: layer_rates needs one weight >= 0 per layer, at least one above 0")
        if self.refresh_every < 1:
            raise ConfigError(f"SAT: refresh_every={self.refresh_every} must be at least 1 step")
        if self.sample_tokens < 1:
            raise ConfigError(f"SAT: sample_tokens={self.sample_tokens} must be at least 1 token")
        if self.ladder < 0 or not 0 <= self.dense_share <= 1:
            raise ConfigError("SAT: ladder must be >= 0 rungs and dense_share between 0 and 1")
        if self.ladder * self.dense_share > 1 + 1e-9:
            raise ConfigError(
                f"SAT: {self.ladder} rungs of {self.dense_share:.0%} each are longer than the run;"
                f" use dense_share <= {1 / self.ladder:.3f}"
            )
        if self.dense_tokens == "loss" and self.scope == "sequence":
            raise ConfigError("SAT: dense_tokens='loss' chooses channels per batch; use scope='batch'")
        if self.dense_tokens == "loss" and self.lazy:
            raise ConfigError("SAT: dense_tokens='loss' touches every channel, so lazy has no effect; use lazy=False")
        if self.omit_in != "forward+backward" and self.heads > 0:
            raise ConfigError(
                f"SAT: omit_in={self.omit_in!r} applies to FFN channels; use heads=0, or omit_in='forward+backward'"
            )

    def _one_of(self, field: str, values: tuple[str | None, ...]) -> None:
        value = getattr(self, field)
        if value not in values:
            raise ConfigError(f"SAT: {field}={value!r}; use one of {', '.join(repr(v) for v in values)}")
