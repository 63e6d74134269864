"""The best low-rank copy of a linear map for inputs like those seen, in closed form.

"Best" is in the output's squared error over those inputs, not in the matrix's entries (a plain SVD): inputs of an FFN
vary in few directions. Cost: an eigendecomposition [D, D] per map.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-2
"""Penalty of least squares, as a share of the mean square of the inputs."""


@torch.no_grad()
def gram(x_TD: Tensor) -> Tensor:
    """fp32 [D, D]: second moments of x, with a ridge."""
    x_TD = x_TD.float()
    found_DD = x_TD.t() @ x_TD / x_TD.shape[0]
    found_DD.diagonal().add_(RIDGE * found_DD.diagonal().mean().clamp_min(1e-12) + 1e-12)
    return found_DD


def low_rank(w_FD: Tensor, gram_DD: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """(V [R, D], U [F, R]) whose product is nearest to w on inputs with these second moments; None: any inputs.

    The singular vectors of w·L, L the Cholesky factor of the moments, from an eigendecomposition [D, D].
    """
    dtype = torch.float64 if w_FD.shape[1] <= 1024 else torch.float32
    w_FD = w_FD.to(dtype)
    factor_DD = None if gram_DD is None else torch.linalg.cholesky(gram_DD.to(dtype))
    seen_FD = w_FD if factor_DD is None else w_FD @ factor_DD
    vectors_DR = torch.linalg.eigh(seen_FD.t() @ seen_FD).eigenvectors[:, -rank:]
    v_RD = vectors_DR.t()
    if factor_DD is not None:
        v_RD = torch.linalg.solve_triangular(factor_DD, v_RD, upper=False, left=False)
    u_FR = seen_FD @ vectors_DR
    size = (u_FR.norm() / v_RD.norm().clamp_min(1e-12)).sqrt().clamp_min(1e-12)  # both factors of one size
    return (v_RD * size).float(), (u_FR / size).float()
