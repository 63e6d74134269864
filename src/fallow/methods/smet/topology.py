"""Which units of each layer are alive: their number, the first choice, and every later move. Functions of masks.

A unit is one weight, or one tile under `block`. Everything is a pure function of (scores, seed, update, layer), drawn
on the CPU, so that every rank and a resumed run decide the same. Cost: one sort of a layer's units per update, a
second for a 1B model's layer, once in `update_every` steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fallow.errors import ConfigError


def densities(shapes: list[tuple[int, int]], density: float, distribution: str) -> list[float]:
    """Density of each layer [O, I], so that together they hold `density` of the weights.

    "erk" (Evci et al. 2020, after Mocanu et al. 2018): d_l ∝ (O + I) / (O · I), layers that would pass 1 are dense.
    """
    if distribution == "uniform":
        return [density] * len(shapes)
    full: set[int] = set()
    while True:
        spare = density * sum(o * i for o, i in shapes) - sum(shapes[n][0] * shapes[n][1] for n in full)
        weight = sum(o + i for n, (o, i) in enumerate(shapes) if n not in full)
        scale = spare / weight if weight else 0.0
        over = {n for n, (o, i) in enumerate(shapes) if n not in full and scale * (o + i) > o * i}
        if not over:
            return [1.0 if n in full else scale * (o + i) / (o * i) for n, (o, i) in enumerate(shapes)]
        full |= over


def active_count(shape: tuple[int, int], density: float, *, per_row: bool) -> int:
    """Active units of one row, or of the whole grid; at least one, at most all."""
    units = shape[1] if per_row else shape[0] * shape[1]
    return max(1, min(units, round(density * units)))


def generator(seed: int, update: int, layer: int) -> torch.Generator:
    """The generator of one layer's draw at one update (0 is the first topology)."""
    mixed = (seed * 0x9E3779B1 + update * 0x85EBCA77 + layer * 0xC2B2AE3D + 0x27D4EB2F) & 0x7FFF_FFFF_FFFF_FFFF
    return torch.Generator().manual_seed(mixed)


def largest(score_RC: Tensor, count: int, *, per_row: bool) -> Tensor:
    """bool [R, C]: the `count` highest scores of each row, or of the whole. Every score of a unit that may not be
    chosen is -inf; the caller asks for no more than are left."""
    flat = score_RC if per_row else score_RC.reshape(1, -1)
    chosen = torch.zeros(flat.shape, dtype=torch.bool, device=score_RC.device)
    if count > 0:
        chosen.scatter_(1, flat.topk(count, dim=1, sorted=False).indices, True)
    return chosen.view(score_RC.shape)


def first_mask(score_RC: Tensor | None, shape: tuple[int, int], count: int, *, per_row: bool, g: torch.Generator):
    """bool [R, C] of the first topology: the largest scores, or at random without scores."""
    score_RC = torch.rand(shape, generator=g) if score_RC is None else score_RC.float()
    return largest(score_RC, count, per_row=per_row)


def moving(active: int, units: int, fraction: float) -> int:
    """Of `units`, of which `active` are alive, how many an update replaces: `fraction` of the living, as far as as many
    are inactive and one survives."""
    return max(0, min(round(fraction * active), units - active, active - 1))


def moving_of(alive_RC: Tensor, fraction: float, *, per_row: bool) -> int:
    """`moving` of every row, or of the whole grid."""
    group = alive_RC[0] if per_row else alive_RC
    return moving(int(group.sum()), group.numel(), fraction)


def move(
    alive_RC: Tensor,
    magnitude_RC: Tensor,
    fraction: float,
    *,
    per_row: bool,
    g: torch.Generator,
    growth_RC: Tensor | None = None,
) -> Tensor:
    """The mask after one update: `fraction` of the active units with the smallest magnitude die, as many that were
    inactive before are born. The number of active units, of every row under `per_row`, stays.

    Args:
        alive_RC: bool [R, C].
        magnitude_RC: fp32 [R, C], ≥ 0; read where alive.
        fraction: 0 to 1 of the active units; fewer where fewer are inactive.
        per_row: the same number in every row (which must hold the same number).
        g: generator of the random growth.
        growth_RC: fp32 [R, C], ≥ 0: the born are those of the largest value; None draws them uniformly.
    """
    n = moving_of(alive_RC, fraction, per_row=per_row)
    if n <= 0:
        return alive_RC
    infinite = torch.tensor(-math.inf, device=alive_RC.device)
    dying = largest(torch.where(alive_RC, -magnitude_RC, infinite), n, per_row=per_row)
    score = torch.rand(alive_RC.shape, generator=g).to(alive_RC.device) if growth_RC is None else growth_RC
    born = largest(torch.where(alive_RC, infinite, score), n, per_row=per_row)
    return (alive_RC & ~dying) | born


def fraction_at(step: int, total_steps: int, *, start: float, end: float, schedule: str, stop_at: float) -> float:
    """Share of active units replaced after optimizer step `step` (0-based) of `total_steps`."""
    if schedule == "constant":
        return start
    progress = min(1.0, (step + 1) / max(1.0, stop_at * total_steps))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def grid_of(name: str, shape: tuple[int, int], block: int | None) -> tuple[int, int]:
    """Rows and columns of units of a weight [O, I]. Raises ConfigError where tiles do not divide it."""
    if block is None:
        return shape
    for what, size in (("outputs", shape[0]), ("inputs", shape[1])):
        if size % block:
            fitting = [b for b in range(16, size + 1, 16) if shape[0] % b == 0 and shape[1] % b == 0]
            mend = f"use block={max(fitting)} for it" if fitting else "no multiple of 16 does; use block=None"
            raise ConfigError(f"SMET: block={block} does not divide the {size} {what} of {name}; {mend}")
    return shape[0] // block, shape[1] // block
