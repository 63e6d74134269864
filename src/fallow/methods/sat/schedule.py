"""SAT's ladder (paper: "ladder omission rate scheduler") and the rounding of rates to sizes that compute well.

Everything here is a pure function, so that a resumed run or another rank arrives at the same sizes.
Channels are kept in tiles of 64, because GEMMs on ragged sizes lose more than the tile saves. Heads are few, so a rate
that one layer cannot express is met on average: the rounding error of a layer is carried to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence


def ladder_factor(step: int, total: int, *, rungs: int, rung_share: float) -> float:
    """Share of the configured rate in force at 0-based `step` of `total`: 1, then `rungs` equal steps down to 0.

    With 4 rungs of 0.05: 1 until 80 % of the run, then 0.75, 0.5, 0.25, 0 for 5 % each.
    """
    if rungs == 0 or rung_share == 0:
        return 1.0
    into = (step + 0.5) / max(total, 1) - (1 - rungs * rung_share)
    if into < 0:
        return 1.0
    rung = min(int(into / rung_share), rungs - 1)
    return 1 - (rung + 1) / rungs


def kept_channels(n: int, rate: float) -> int:
    """Channels kept of `n` at omission `rate`: a multiple of 64 (of less where n is under 1,024), at least one tile."""
    if rate <= 0:
        return n
    tile = min(64, 1 << max(n // 16, 1).bit_length() - 1)
    return min(n, max(tile, round((1 - rate) * n / tile) * tile))


def kept_units(n: int, rates: Sequence[float]) -> list[int]:
    """Heads (or KV groups) kept of `n` in each layer: whole numbers, at least 1, whose mean meets the mean rate."""
    kept, error = [], 0.0
    for rate in rates:
        wish = rate * n + error
        drop = max(0, min(n - 1, int(wish + 0.5)))
        error = wish - drop
        kept.append(n - drop)
    return kept


def spread(rate: float, weights: Sequence[float], *, ceiling: float = 0.95) -> list[float]:
    """Per-layer rates in proportion to `weights`, each at most `ceiling`, with mean `rate`."""
    rates = [0.0] * len(weights)
    free = [i for i, w in enumerate(weights) if w > 0]
    left = rate * len(weights)
    while free and left > 1e-12:
        scale = left / sum(weights[i] for i in free)
        full = [i for i in free if rates[i] + scale * weights[i] >= ceiling]
        if not full:
            for i in free:
                rates[i] += scale * weights[i]
            return rates
        for i in full:
            left -= ceiling - rates[i]
            rates[i] = ceiling
            free.remove(i)
    return rates
