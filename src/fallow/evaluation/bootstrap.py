"""Intervals by bootstrap: of a mean, of a ratio of sums, and of the difference of two that share their samples.

Samples are drawn with replacement, 2,000 times, from a generator seeded by the number of samples alone, so a figure
printed twice is the same twice. Dense and sparse see the same documents, so their difference is resampled in pairs: the
spread between documents, which is most of either interval, cancels. A normal approximation would be cheaper and wrong
where few samples score 0 or 1. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fallow.errors import DataError

DRAWS = 2000


@dataclass(kw_only=True, slots=True, frozen=True)
class Interval:
    """A figure and where it lies with `level` confidence, in the figure's own unit."""

    mean: float
    low: float
    high: float
    samples: int
    level: float = 0.95

    @property
    def above_zero(self) -> bool:
        """Whether all of the interval is."""
        return self.low > 0

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def text(self, decimals: int = 3) -> str:
        """`0.512 [0.498, 0.530]`."""
        return f"{self.mean:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, level: float = 0.95, draws: int = DRAWS
) -> Interval:
    """The sum of one over the sum of the other, samples drawn together: nats over tokens, for one.

    Raises:
        DataError: there is no sample.
    """
    if not len(numerators):
        raise DataError("no sample to evaluate; raise the limit, or give more data")
    top_N, under_N = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    drawn = resample(len(top_N), draws)
    found = top_N[drawn].sum(1) / under_N[drawn].sum(1)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        mean=float(top_N.sum() / under_N.sum()), low=float(low), high=float(high), samples=len(top_N), level=level
    )


def mean(values: Sequence[float], *, level: float = 0.95, draws: int = DRAWS) -> Interval:
    """The mean. Raises DataError: there is no sample."""
    return ratio(values, [1.0] * len(values), level=level, draws=draws)


def difference(a: Sequence[float], b: Sequence[float], *, level: float = 0.95, draws: int = DRAWS) -> Interval:
    """Mean of `a` minus mean of `b`, sample by sample: the same documents in the same order."""
    return mean([x - y for x, y in zip(a, b, strict=True)], level=level, draws=draws)


def resample(count: int, draws: int = DRAWS) -> np.ndarray:
    """int64 [draws, count]: which samples each draw takes."""
    return np.random.default_rng(count).integers(count, size=(draws, count))
