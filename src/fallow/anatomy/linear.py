"""Linear layers as fallow reads them: `nn.Linear`, and GPT-2's `Conv1D`, which stores its weight transposed.

Everything above this file sees a weight as [O, I] (outputs, inputs); for Conv1D that is a transposed view, never a
copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fallow.anatomy.int8 import Int8Linear
from fallow.errors import UnsupportedModelError

Linear: TypeAlias = nn.Linear | Conv1D


def as_linear(module: nn.Module, *path: str) -> Linear:
    """`module` itself, checked to be a plain linear layer with a full floating weight.

    `path` is its dotted name, in parts: joined only for the error, because a compiled forward that read its layer's own
    name would be compiled anew for every layer.

    Raises:
        UnsupportedModelError: it is an adapter, another's quantised layer or something else.
    """
    if isinstance(module, Int8Linear):  # it computes its weight when asked for it
        return module
    if (
        isinstance(module, nn.Linear | Conv1D)
        and module.weight.is_floating_point()
        and tuple(weight_OI(module).shape) == shape_OI(module)
    ):
        return module
    raise UnsupportedModelError(
        f"{'.'.join(path)} is a {type(module).__name__}, not a plain Linear or Conv1D with a floating weight; "
        "merge adapters and dequantise the model first"
    )


def weight_OI(module: Linear) -> Tensor:
    """The weight as [O, I], read now; gradients flow through the view."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def shape_OI(module: Linear) -> tuple[int, int]:
    """(outputs, inputs)."""
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)


def out_dim(module: Linear) -> int:
    """Dimension of the stored weight along which outputs lie; inputs lie along the other."""
    return 1 if isinstance(module, Conv1D) else 0


def weight_parameter(module: Linear) -> nn.Parameter:
    """The weight as it is stored."""
    return cast(nn.Parameter, module.weight)


def output_parameters(module: Linear) -> list[tuple[str, nn.Parameter, int]]:
    """(name, parameter, dimension along which outputs lie) of the weight and of the bias, if there is one."""
    found = [("weight", weight_parameter(module), out_dim(module))]
    if module.bias is not None:
        found.append(("bias", cast(nn.Parameter, module.bias), 0))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearView:
    """One linear layer of a decoder layer."""

    name: str
    """Dotted name of the module in the model."""
    layer: int
    """Index of its decoder layer."""
    module: Linear
    """The stock module."""

    @property
    def n_out(self) -> int:
        return self.module.weight.shape[out_dim(self.module)]

    @property
    def n_in(self) -> int:
        return self.module.weight.shape[1 - out_dim(self.module)]

    def weight(self) -> Tensor:
        """[n_out, n_in], read now."""
        return weight_OI(self.module)
