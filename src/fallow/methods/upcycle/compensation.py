"""What stands in for the dead channels of an FFN: a low-rank affine map of its input, y += U (V x) + b. (Ours.)

What a token's dead channels would have added is small for each and not for all: on average over tokens it is a
function of the input, of which a map of rank 64 catches a fifth of what skipping them costs in loss, for 3 % of the
bytes of a small model's FFN and 0.2 % of a 7B model's. The obvious alternative, a constant, is its rank 0. The map of
least squares has a closed form from the second moments of inputs and of what is missing; joint training goes on from
there. Cost of fitting: a dense pass over the tokens, and per layer one moment matrix [D, 2D].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fallow.methods.upcycle.lowrank import low_rank

RIDGE_TOKENS = 200
"""The ridge weighs as much as so many tokens would: with few tokens the map stays small."""


class Compensation(nn.Module):
    """fp32 `v_RD` [R, D], `u_DR` [D, R], `bias_D` [D]. Adds nothing until it is fitted or trained."""

    def __init__(self, *, rank: int, width: int, device: torch.device) -> None:
        super().__init__()
        begin_RD = torch.randn(rank, width, generator=torch.Generator().manual_seed(rank)) * width**-0.5
        self.v_RD = nn.Parameter(begin_RD.to(device))  # not zeros: beside a U of zeros it would never learn
        self.u_DR = nn.Parameter(torch.zeros(width, rank, device=device))
        self.bias_D = nn.Parameter(torch.zeros(width, device=device))

    _served: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D] in its dtype."""
        v_RD, u_DR, bias_D = self._in(x.dtype)
        return nn.functional.linear(nn.functional.linear(x, v_RD), u_DR, bias_D)

    def _in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters in this dtype: without gradients, kept until they are `stale`."""
        if torch.is_grad_enabled():
            return self.v_RD.to(dtype), self.u_DR.to(dtype), self.bias_D.to(dtype)
        if self._served is None or self._served[0].dtype != dtype:
            self._served = self.v_RD.to(dtype), self.u_DR.to(dtype), self.bias_D.to(dtype)
        return self._served

    @torch.no_grad()
    def packed(self, dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """As the op `bank_ffn` takes it, times `share`."""
        return self.v_RD.to(dtype), (self.u_DR * share).to(dtype), self.bias_D * share

    def stale(self) -> None:
        """The parameters have changed, or will."""
        self._served = None

    @torch.no_grad()
    def take(self, moments: Moments) -> None:
        """Become the best map of this rank for what was seen."""
        v_RD, u_DR, bias_D = moments.solve(self.v_RD.shape[0])
        self.v_RD.copy_(v_RD)
        self.u_DR.copy_(u_DR)
        self.bias_D.copy_(bias_D)
        self.stale()


class Moments:
    """Sums over tokens: inputs x [T, D], and what is missing from the output, m [T, D]."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sum_D: Tensor | float = 0.0
        self.missing_D: Tensor | float = 0.0
        self.inputs_DD: Tensor | float = 0.0
        self.both_DD: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, x_TD: Tensor, missing_TD: Tensor) -> None:
        x_TD, missing_TD = x_TD.float(), missing_TD.float()
        self.tokens += x_TD.shape[0]
        self.sum_D = self.sum_D + x_TD.sum(0)
        self.missing_D = self.missing_D + missing_TD.sum(0)
        self.inputs_DD = self.inputs_DD + x_TD.t() @ x_TD
        self.both_DD = self.both_DD + missing_TD.t() @ x_TD

    def solve(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(V [R, D], U [D, R], b [D]) of least squares with a ridge, among the maps of this rank."""
        n = self.tokens
        mean_D, missing_D = torch.as_tensor(self.sum_D) / n, torch.as_tensor(self.missing_D) / n
        cov_DD = torch.as_tensor(self.inputs_DD) / n - torch.outer(mean_D, mean_D)
        both_DD = torch.as_tensor(self.both_DD) / n - torch.outer(missing_D, mean_D)
        cov_DD.diagonal().add_(RIDGE_TOKENS / n * cov_DD.diagonal().mean() + 1e-12)
        full_DD = torch.linalg.solve(cov_DD, both_DD.t()).t()
        v_RD, u_DR = low_rank(full_DD, cov_DD, rank)
        return v_RD, u_DR, missing_D - u_DR @ (v_RD @ mean_D)
