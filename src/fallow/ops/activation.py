"""The activations that fallow's FFN operations compute, by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
RELUS = ("relu", "relu2")
"""Those with exact zeros."""


def activation(z: Tensor, act: str) -> Tensor:
    """`act` is one of `ACTIVATIONS`; "relu2" is the square of ReLU."""
    if act == "silu":
        return F.silu(z)
    if act == "relu":
        return F.relu(z)
    if act == "relu2":
        return F.relu(z).square()
    return F.gelu(z, approximate="tanh" if act == "gelu_tanh" else "none")
