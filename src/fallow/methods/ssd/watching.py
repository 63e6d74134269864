"""What SSD reads out of a pass over its held-out batch: patterns, losses, and every number by layer."""

from __future__ import annotations

from typing import Any

import torch

from fallow.methods.ranks import agreed
from fallow.methods.ssd.monitor import LayerReport, Patterns, Watcher, mean_of
from fallow.methods.ssd.switching import Seen
from fallow.methods.watching import Watch


class ExpertWatch(Watch):
    """The batch that SSD looks at."""

    def observe(self, patterns: list[Patterns], number: int, *, sparse: bool) -> tuple[Seen, dict[str, list[Any]]]:
        """Observation `number`: (means over layers and the losses, every number by layer); `sparse`: also the loss by
        experts."""
        watcher = Watcher(patterns, number)
        dense_loss = self.pass_over(observer=watcher)
        sparse_loss = self.pass_over(sparse=True) if sparse else None
        reports = watcher.reports
        means = {
            "similarity": mean_of(reports, lambda r: r.similarity),
            "zeros": mean_of(reports, lambda r: r.zeros),
            "dense_loss": dense_loss,
            "sparse_loss": sparse_loss,
        }
        # every rank computes the same numbers, but a decision must not hang on that
        numbers = [float("nan") if m is None else m for m in means.values()]
        told = agreed(torch.tensor(numbers, dtype=torch.float64, device=self.model.device)).tolist()
        seen = Seen(**{n: None if v != v else v for n, v in zip(means, told, strict=True)})
        return seen, {c: [getattr(r, c) for r in reports] for c in LayerReport.__dataclass_fields__}
