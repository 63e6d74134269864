"""Upcycle's settings. Every field is validated when the object is made; the message says how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fallow.errors import ConfigError

Selection = Literal["predictor", "oracle", "random", "threshold"]
SELECTIONS = ("predictor", "oracle", "random", "threshold")
_CHOICES: dict[str, tuple[str, ...]] = {
    "predictor": ("linear", "bilinear", "quantized"),
    "gate": ("hard", "straight_through", "smooth", "soft_topk"),
    "selection": SELECTIONS,
    "criterion": ("hidden", "contribution"),
    "prompts": ("dense", "sparse"),
}
_SHARES = ("anneal", "distill", "monitor_every")
_NOT_NEGATIVE = ("hidden_loss", "predictor_loss", "predictor_lr", "fit_tokens", "fit_lr")


@dataclass(kw_only=True, slots=True, frozen=True)
class Upcycle:
    """Predictor-gated bank-wise sparsity (Huang et al., arXiv 2606.10722). Fields marked *ours* are not the paper's,
    of which only the abstract's facts were published.

    The channels of a gated FFN lie in banks of `bank`; of every bank a token computes the `keep` channels that a small
    predictor scores highest, so that decoding reads `keep / bank` of the FFN's weights. Weights stay dense and under
    their stock names.
    """

    bank: int = 64
    """Consecutive channels that compete with each other; must divide the FFN's channels."""

    keep: int | tuple[int, ...] = 16
    """Channels alive in every bank, 1 <= keep <= bank; a tuple gives every layer its own (ours)."""

    predictor: Literal["linear", "bilinear", "quantized"] = "quantized"
    """What scores channels. "linear": two thin matrices give a logit (the paper's); needs long training. "bilinear"
    (ours): thin factors of the gate and the up projection, |act(gate)·up|. "quantized" (ours): the same from copies of
    both in `bits` bits, which needs no training at all."""

    rank: int | None = None
    """Inner width of linear and bilinear predictors; None: a fourteenth of the model's width for linear ones (256 at
    3584), a ninth for bilinear ones, in steps of 16."""

    bits: int = 4
    """Bits of the copies of a quantized predictor: 2 or 4."""

    group: int = 64
    """Weights of the copies that share one scale."""

    gate: Literal["hard", "straight_through", "smooth", "soft_topk"] = "straight_through"
    """How the predictor learns from the language model's loss. "hard": not at all. "straight_through": as if a channel
    were multiplied by the sigmoid of its score. "smooth": survivors really are multiplied, by twice the sigmoid
    (linear predictors only). "soft_topk": as straight-through, around the score at which a bank's survivors end."""

    selection: Selection = "predictor"
    """Who chooses: the predictor, or a control (ours): "oracle" the true best, "random", "threshold" all channels above
    a threshold per layer that passes `keep / bank` of them on the watched batch (as CATS and TEAL do)."""

    criterion: Literal["hidden", "contribution"] = "hidden"
    """What makes a channel the better one: |h|, or |h| times the norm of its column of the down projection (ours)."""

    compensation: int = 0
    """Rank of an affine map of the FFN's input that stands in for its dead channels, such as 64; 0: none (ours). Fitted
    in closed form before training, trained with the rest."""

    prompts: Literal["dense", "sparse"] = "dense"
    """Whether the prompt of a generation, several tokens at once with a cache, is computed by all channels, or sparse
    like the text that follows (ours). A prompt is bound by arithmetic, to which choosing adds: 1,024 tokens of SmolLM2
    take 1.18 s on two cores, sparse 1.73 s, and what is read by all channels is answered better."""

    anneal: float = 0.0
    """Share of the run in which `keep` falls from `bank` to its value (ours)."""

    distill: float = 0.0
    """Share of the loss that is divergence from the model as it was before training, 0 to 1 (ours). Keeps a frozen
    copy of it in memory and runs it forward at every step."""

    teacher: str | None = None
    """From what `distill` measures the divergence instead (ours). A folder or hub name: a model of the same shape;
    where training goes on with new text, its dense companion knows that text and the model as it was does not.
    "self": the dense mode of the same weights, which learns from the text at the same time (in-place distillation, Yu
    and Huang, arXiv 1903.05134); every step computes the batch in both modes, for twice the time, and both are kept."""

    hidden_loss: float = 0.0
    """Weight of the squared distance between the FFNs' outputs and the parent's, relative to its size (ours; needs
    `distill` above 0)."""

    predictor_loss: float = 0.0
    """Weight, in joint training, of the loss that predictors are fitted by (ours)."""

    predictor_lr: float = 1.0
    """Predictors learn at this times the learning rate; 0 leaves them as fitted."""

    fit_tokens: int = 0
    """Tokens on which predictors are fitted before training, backbone frozen (first stage); 0: started from the
    weights and the watched batch alone."""

    fit_lr: float = 1e-3
    """Learning rate of the first stage."""

    monitor_every: float = 0.25
    """Share of the run between two looks at recall and the gap on the watched batch; 0: never."""

    seed: int = 0
    """Seed of random selection and of starts."""

    def __post_init__(self) -> None:
        if not _whole(self.bank) or self.bank < 2:
            raise ConfigError(f"Upcycle: bank={self.bank!r} must be a whole number of at least 2, such as 64")
        if isinstance(self.keep, list):  # from YAML
            object.__setattr__(self, "keep", tuple(self.keep))
        for k in self.keep if isinstance(self.keep, tuple) else (self.keep,):
            if not _whole(k) or not 1 <= k <= self.bank:
                raise ConfigError(
                    f"Upcycle: keep={k!r} must be a whole number between 1 and bank={self.bank}; a quarter of the bank"
                    f" is usual ({max(1, self.bank // 4)})"
                )
        for field, values in _CHOICES.items():
            if getattr(self, field) not in values:
                raise ConfigError(
                    f"Upcycle: {field}={getattr(self, field)!r}; use one of {', '.join(map(repr, values))}"
                )
        if self.rank is not None and (not _whole(self.rank) or self.rank < 1):
            raise ConfigError(f"Upcycle: rank={self.rank!r} must be a positive whole number, or None")
        if self.bits not in (2, 4):
            raise ConfigError(f"Upcycle: bits={self.bits!r}; quantized predictors have 2 or 4 bits")
        if not _whole(self.group) or self.group < 16 or self.group % 16:
            raise ConfigError(f"Upcycle: group={self.group!r} must be a multiple of 16, such as 64")
        if not _whole(self.compensation) or self.compensation < 0:
            raise ConfigError(f"Upcycle: compensation={self.compensation!r} must be a rank such as 64, or 0")
        if self.gate == "smooth" and self.predictor != "linear":
            raise ConfigError(
                f"Upcycle: gate='smooth' multiplies by a logit's sigmoid and a {self.predictor} predictor has no"
                " logits; use gate='straight_through', or predictor='linear'"
            )
        for field in _SHARES:
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"Upcycle: {field}={getattr(self, field)} must lie between 0 and 1")
        for field in _NOT_NEGATIVE:
            if getattr(self, field) < 0:
                raise ConfigError(f"Upcycle: {field}={getattr(self, field)} must not be negative")
        if self.teacher is not None and not self.distill:
            raise ConfigError("Upcycle: teacher is asked by distill only; set distill above 0, such as 0.7")
        if self.hidden_loss and not self.distill:
            raise ConfigError("Upcycle: hidden_loss compares with the parent that distill keeps; set distill above 0")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
