"""The next token from logits: the largest, or drawn from the smallest set whose probability reaches `top_p`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.errors import ConfigError


@dataclass(slots=True, frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the largest logit."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities add up to this; 1 draws from all."""
    seed: int | None = None
    """Of the draws; None takes torch's own generator."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature} must be 0 (the likeliest token) or above, such as 0.7")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self) -> torch.Generator | None:
        """A fresh one for every text, so that the same seed gives the same text; None without a seed."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)


def pick(logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """The next token of logits [V], floating. As transformers does it: temperature first, then top-p."""
    if sampling.greedy:
        return int(logits_V.argmax())
    probability_V = torch.softmax(logits_V.float().cpu() / sampling.temperature, dim=0)
    if sampling.top_p < 1:
        sorted_V, order_V = probability_V.sort(descending=True)
        # A token stays if those above it do not reach top_p yet, so the likeliest always does.
        kept = int((sorted_V.cumsum(0) - sorted_V < sampling.top_p).sum())
        drawn = torch.multinomial(sorted_V[:kept], 1, generator=generator)
        return int(order_V[drawn])
    return int(torch.multinomial(probability_V, 1, generator=generator))
