"""How many optimizer steps a weight has taken since it was born, from one byte.

Births happen only at topology updates, so "updates since birth" tells a weight's age: with u updates since its birth
and s steps since the last update, t = s + (steps between the last u updates). An fp32 count per weight, as in the
paper's code, costs four times as much.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FIRST = 255
"""Age byte of weights that are there from the start, or older than 254 updates: their clock is the run's."""
OLDEST = 254


@dataclass(slots=True)
class Clock:
    """Steps at which the topology moved."""

    updates: list[int] = field(default_factory=list)
    """Optimizer steps taken at each of the last 255 updates, oldest first."""

    def moved(self, step: int) -> None:
        """An update after `step` optimizer steps."""
        self.updates = [*self.updates, step][-(OLDEST + 1) :]

    def steps_of(self, step: int) -> Tensor:
        """float64 [256]: optimizer steps, the `step`-th included, of a weight of each age; unborn ages count from 0."""
        table = torch.full((256,), float(step), dtype=torch.float64)
        table[: len(self.updates)] = step - torch.tensor(self.updates[::-1], dtype=torch.float64)
        return table


def older(age: Tensor) -> Tensor:
    """uint8 ages after one more update: 254 becomes FIRST, which stays."""
    return torch.where(age >= OLDEST, FIRST, age + 1).to(torch.uint8)


def tables(
    clock: Clock,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    local: bool,
    warmup: int,
) -> tuple[Tensor, Tensor]:
    """fp32 [256] each: step size (ramp included) and root of the second bias correction, by age byte.

    Args:
        clock: when the topology moved.
        step: 1-based number of this optimizer step.
        lr: learning rate of the group.
        betas: Adam's.
        local: bias correction by a weight's own steps t; otherwise by `step`.
        warmup: steps W of the ramp min(1, t / W) of weights born later (paper, "warm-up"); 0 for none.
    """
    t = clock.steps_of(step) if local else torch.full((256,), float(step), dtype=torch.float64)
    size, root = lr / (1 - betas[0] ** t), (1 - betas[1] ** t).sqrt()
    if warmup:
        ramp = (t / warmup).clamp(max=1.0)
        ramp[FIRST] = 1.0
        size = size * ramp
    return size.float(), root.float()
