"""How much each FFN channel or attention head matters, from its weights and a sample of the layer's input.

One formula serves both: a *unit* is one channel (1 row of each input matrix, 1 column of the output matrix) or one KV
group (its head_dim rows of v, and the columns of o of its query heads). Scores cost a GEMM on `sample_tokens` tokens at
most, about sample/T of the layer's forward. Paper: §3.2 (uniform, magnitude, wanda, maxip); "activation" is ours,
after the
finding that root-mean-square beats mean magnitude on SmolLM2 (loss 3.92 against 4.15 at half the channels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fallow.errors import ConfigError


@dataclass(slots=True, frozen=True)
class UnitInput:
    """What an importance function sees of one layer. U units; R rows belong to each unit (1 for channels)."""

    x_SD: Tensor
    """[S, D] sampled tokens of the layer's input, in the model's dtype."""
    w_in: tuple[Tensor, ...]
    """Input matrices, each [U·R, D], unit-major: gate and up of an FFN (up alone without a gate), v of an attention."""
    w_out: Tensor
    """[D, U·C] output matrix, unit-major: down of an FFN, o of an attention."""
    hidden: Callable[[Tensor], Tensor]
    """x_SD -> [S, U·R]: what the unit computes of these tokens: act(gate)·up of an FFN, v of an attention."""
    n_units: int
    generator: torch.Generator
    """Seeded from (config.seed, step, layer): the same on every rank and after a resume."""


class Importance(Protocol):
    """A user's importance function: returns one finite score ≥ 0 per unit, [U], any floating dtype; larger is kept.

    It is called under no_grad. Ranks share the root mean square of their scores, so it need not communicate, and it
    must not draw random
    numbers from anything but `unit.generator`."""

    def __call__(self, unit: UnitInput) -> Tensor: ...


def _per_unit(values: Tensor, n_units: int) -> Tensor:
    """Sum a non-negative [U·R] vector over the R rows of each unit."""
    return values.view(n_units, -1).sum(1)


def _out_norm2(unit: UnitInput) -> Tensor:
    return _per_unit(_norm2(unit.w_out, 0), unit.n_units)


def _norm2(w: Tensor, dim: int) -> Tensor:
    """Squared L2 norms along `dim` in fp32. Along dim 0 by slices that stay in cache: 2 ms where one call takes 73."""
    if dim == 1:
        return torch.linalg.vector_norm(w, dim=1, dtype=torch.float32).square_()
    total = torch.zeros(w.shape[1], device=w.device)
    for rows in w.split(64):
        total += rows.float().square().sum(0)
    return total


def uniform(unit: UnitInput) -> Tensor:
    """Random: the control that any importance must beat."""
    return torch.rand(unit.n_units, generator=unit.generator)


def magnitude(unit: UnitInput) -> Tensor:
    """L2 norm of all weights of the unit."""
    rows = sum(_per_unit(_norm2(w, 1), unit.n_units) for w in unit.w_in)
    return (rows + _out_norm2(unit)).sqrt_()


def wanda(unit: UnitInput) -> Tensor:
    """Input norm times weight, |W|·‖x‖ (Wanda's score), as the L2 norm over the unit's input weights."""
    x_D = _norm2(unit.x_SD, 0).sqrt_()
    parts = [_per_unit((w.float() * x_D).square_().sum(1), unit.n_units) for w in unit.w_in]
    return torch.stack(parts).sum(0).sqrt_()


def maxip(unit: UnitInput) -> Tensor:
    """Largest inner product of an input with the unit's rows."""
    best = torch.stack([torch.mm(unit.x_SD, w.t()).abs_().amax(0).float() for w in unit.w_in]).amax(0)
    return best.view(unit.n_units, -1).amax(1)


def activation(unit: UnitInput) -> Tensor:
    """Root mean square of the unit's activation times the L2 norm of its output weights."""
    h2 = _norm2(unit.hidden(unit.x_SD), 0)
    return (_per_unit(h2, unit.n_units) * _out_norm2(unit)).sqrt_()


BUILT_IN: dict[str, Importance] = {
    "uniform": uniform,
    "magnitude": magnitude,
    "wanda": wanda,
    "maxip": maxip,
    "activation": activation,
}


def resolve(importance: str | Importance) -> Importance:
    return BUILT_IN[importance] if isinstance(importance, str) else importance


@torch.no_grad()
def score(importance: Importance, unit: UnitInput) -> Tensor:
    """[U] float32 scores, checked, as the root mean square over ranks. Raises ConfigError when a user's function
    breaks the
    contract."""
    s = importance(unit)
    if not isinstance(s, Tensor) or s.shape != (unit.n_units,):
        got = tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__
        raise ConfigError(
            f"importance {importance!r} returned {got}; it must return a tensor of shape ({unit.n_units},)"
        )
    s = s.float()
    if not bool(torch.isfinite(s).all()):
        raise ConfigError(
            f"importance {importance!r} returned scores that are not finite; check the loss and the inputs"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # the mean of squares makes "activation" and "wanda" of equal shares what they would be on the whole batch
        s = s.square()
        torch.distributed.all_reduce(s)
        s = (s / torch.distributed.get_world_size()).sqrt_()
    return s


def choose(scores_U: Tensor, k: int, *, selection: str, generator: torch.Generator) -> Tensor:
    """[k] sorted int64 units: the top k, or k drawn without replacement in proportion to the scores (Gumbel top-k)."""
    if selection == "sample":
        noise = torch.rand(len(scores_U), generator=generator).to(scores_U.device)
        scores_U = scores_U.clamp_min(1e-30).log() - (-noise.clamp(1e-9, 1 - 1e-7).log()).log()
    return torch.topk(scores_U, k, sorted=False).indices.sort().values
