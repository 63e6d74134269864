"""Interleaved timing of rival forms of the same work, in one process.

Machines drift by tens of per cent within minutes. Timing one form after the other measures the drift; here every round
runs each form once, in alternating order, and a ratio is the median over rounds of ratios taken within a round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Step = Callable[[], object]


@dataclass(slots=True)
class Timing:
    """Seconds of every timed round, per form."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, form: str) -> float:
        return statistics.median(self.seconds[form])

    def ratio(self, slow: str, fast: str) -> float:
        """Median of slow/fast, each pair taken within one round."""
        return statistics.median(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))

    def spread(self, slow: str, fast: str) -> tuple[float, float]:
        """Quartiles of the paired ratios."""
        ratios = sorted(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))
        return ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]

    def fastest(self, prefix: str) -> str:
        """The form with the lowest median among those whose name starts with `prefix`."""
        return min((f for f in self.seconds if f.startswith(prefix)), key=self.median)


def interleave(
    forms: Mapping[str, Step], *, rounds: int, warm_up: int = 1, prepare: Mapping[str, Step] | None = None
) -> Timing:
    """Time each form once per round, after `warm_up` untimed rounds. Order turns round from one round to the next.
    What `prepare` has for a form is called before it, untimed."""
    timing = Timing({name: [] for name in forms})
    names = list(forms)
    gc.collect()
    for i in range(warm_up + rounds):
        for name in names if i % 2 == 0 else reversed(names):
            if prepare and name in prepare:
                prepare[name]()
            began = time.perf_counter()
            forms[name]()
            if i >= warm_up:
                timing.seconds[name].append(time.perf_counter() - began)
    return timing
