"""The layers SMET puts in the place of a model's linear layers: what they share, and the one of single weights.

blocks.py has the one of tiles. Both hold `values`, the active weights only, and know their topology as a mask of
*units* [R, C]. The stock layer's weight is freed; `dense_weight()` gives it back with zeros. `state_dict()` holds
`values` and `bitmap` (one bit per unit), so checkpoints are as small as the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fallow.errors import CheckpointError
from fallow.methods.smet import moving
from fallow.ops import packed
from fallow.shards import whole

Carry = Callable[[Tensor], Tensor]
"""A whole tensor of `values`' shape in the old order -> in the new one, zeros for the newborn."""
Probe = Callable[[Tensor, Tensor], None]
"""Called in backward with (dy [T, O], x [T, I])."""


class SparseLinear(nn.Module, ABC):
    """A linear layer [O, I] of which only some units exist."""

    values: nn.Parameter
    bitmap: Tensor
    bias: nn.Parameter | None

    def __init__(self, stock: nn.Module, shape: tuple[int, int], grid: tuple[int, int]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.grid = grid
        self.probe: Probe | None = None
        self.register_parameter("bias", cast("nn.Parameter | None", stock.bias))
        self.training = stock.training
        object.__setattr__(self, "_stock", stock)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def stock(self) -> nn.Module:
        """The stock layer, without its weight; not registered as a child."""
        return self.__dict__["_stock"]

    def mask(self) -> Tensor:
        """bool [R, C]: the units that are active."""
        return packed.naive.unpack_bits(self.bitmap, self.grid[1])

    @abstractmethod
    def densify(self, whole_values: Tensor) -> Tensor:
        """[O, I] of a whole tensor of `values`' shape, zeros where inactive."""

    def dense_weight(self) -> Tensor:
        """[O, I], zeros where inactive; under FSDP2 a collective."""
        return self.densify(whole(self.values))

    @abstractmethod
    def growth_scores(self, dy_TO: Tensor, x_TI: Tensor) -> Tensor:
        """fp32 [R, C]: the size of the weight gradient of each unit, active or not."""

    @abstractmethod
    def moved(
        self, values: Tensor, fraction: float, *, per_row: bool, g: torch.Generator, candidates: Tensor | None
    ) -> Tensor:
        """The bitmap after one update of the topology (`topology.move`), decided by whole `values`; `candidates` is a
        bitmap of the units to be born, None draws them."""

    @abstractmethod
    def rebuild(self, bitmap: Tensor) -> Carry:
        """Adopt a topology with as many active units, and return how tensors of `values`' shape follow."""

    @abstractmethod
    def check(self, bitmap: Tensor, n_values: torch.Size, name: str) -> None:
        """Raise CheckpointError unless a stored bitmap fits this layer and its stored values."""

    @abstractmethod
    def refresh(self) -> None:
        """Recompute what is derived from the bitmap, after it was loaded."""

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that asks a linear layer for its dtype or shape; never trained through."""
        return self.dense_weight()

    def extra_repr(self) -> str:
        share = self.values.numel() / (self.out_features * self.in_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, density={share:.3f}"

    def _watch(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.probe is None or not torch.is_grad_enabled() else _Probed.apply(y, x, self.probe)


class PackedLinear(SparseLinear):
    """Single weights: bitmap, row offsets and packed values, [O, k] where every row holds k, else [n]."""

    start: Tensor

    def __init__(self, stock: nn.Module, weight_OI: Tensor, mask_OI: Tensor, *, per_row: bool) -> None:
        super().__init__(stock, (weight_OI.shape[0], weight_OI.shape[1]), (mask_OI.shape[0], mask_OI.shape[1]))
        layout = packed.layout_of(mask_OI.to(weight_OI.device))
        values = packed.compress(weight_OI.detach(), layout)
        self.values = nn.Parameter(values.view(weight_OI.shape[0], -1) if per_row else values)
        self.register_buffer("bitmap", layout.bitmap_OB)
        self.register_buffer("start", layout.start_O1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = packed.packed_linear(x, self.values, self.bitmap, self.start, self.bias)
        return self._watch(y, x)

    def _layout(self) -> packed.Layout:
        return packed.Layout(self.bitmap, self.start, self.in_features, self.values.numel())

    def densify(self, whole_values: Tensor) -> Tensor:
        return packed.expand(whole_values, self._layout())

    def growth_scores(self, dy_TO: Tensor, x_TI: Tensor) -> Tensor:
        return weight_gradient(dy_TO, x_TI).abs_()

    def moved(
        self, values: Tensor, fraction: float, *, per_row: bool, g: torch.Generator, candidates: Tensor | None
    ) -> Tensor:
        return moving.moved(self._layout(), values, fraction, per_row=per_row, g=g, candidates_OB=candidates)

    def rebuild(self, bitmap: Tensor) -> Carry:
        old = packed.Layout(self.bitmap.clone(), self.start.clone(), self.in_features, self.values.numel())
        new = packed.layout_from_bitmap(bitmap, self.in_features, expected=self.values.numel())
        self.bitmap.copy_(new.bitmap_OB)
        self.start.copy_(new.start_O1)
        return partial(moving.recode, old=old, new=new)

    def check(self, bitmap: Tensor, n_values: torch.Size, name: str) -> None:
        same_shapes(self, bitmap, n_values, name)
        layout = packed.layout_from_bitmap(bitmap, self.in_features, expected=n_values.numel(), name=name)
        if self.values.dim() == 2 and bool((layout.start_O1.diff() != self.values.shape[1]).any()):
            raise CheckpointError(
                f"{name} is corrupt: its rows hold different numbers of weights; resume from an earlier checkpoint"
            )

    def refresh(self) -> None:
        self.start.copy_(packed.layout_from_bitmap(self.bitmap, self.in_features).start_O1)


def weight_gradient(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    """fp32 [O, I], summed over all ranks; dense, so it must not outlive the call."""
    gradient_OI = (dy_TO.t() @ x_TI).float()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(gradient_OI)
    return gradient_OI


def same_shapes(layer: SparseLinear, bitmap: Tensor, n_values: torch.Size, name: str) -> None:
    if bitmap.shape != layer.bitmap.shape or n_values != layer.values.shape:
        raise CheckpointError(
            f"{name}: this checkpoint holds values {tuple(n_values)} with a bitmap {tuple(bitmap.shape)}, the model"
            f" {tuple(layer.values.shape)} with {tuple(layer.bitmap.shape)}: it is of another density, structure or"
            " model; resume with the recipe that wrote it"
        )


class _Probed(torch.autograd.Function):
    """The identity on y; in backward it shows dy and x to a probe. A function of autograd rather than a tensor hook, so
    that under gradient checkpointing x is the recomputed one and is not kept."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, probe: Probe) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.probe = probe
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.probe(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
        return dy, None, None
