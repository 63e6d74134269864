"""Where the heads lie in an attention's weights, and the slots that compute only the kept ones.

Every projection is a row of blocks, one block per head and role (q, k or v): `head_dim` rows each, or `3·head_dim`
where a family interleaves q, k and v per head (GPT-NeoX). A `Placement` says which blocks belong to which heads, so
that one formula maps kept heads to kept rows for separate, fused and interleaved projections alike. The obvious
alternative, masking whole heads, costs full FLOPs; here the GEMMs and the attention itself shrink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fallow.anatomy.linear import Linear, weight_OI
from fallow.anatomy.slot import Slot
from fallow.errors import ConfigError
from fallow.ops.subset_linear import subset_linear


@dataclass(frozen=True, slots=True)
class Placement:
    """Blocks of heads along one dimension of a weight."""

    block: int
    """Rows (or columns) per head in this projection."""
    parts: tuple[tuple[int, Literal["q", "kv"]], ...]
    """Runs of blocks: index of the first block, and whether query or KV heads number the run."""

    def blocks(self, q_heads: Tensor, kv_heads: Tensor) -> Tensor:
        """Sorted indices of the kept blocks, int64, from sorted indices of the kept heads."""
        kept = [first + (q_heads if which == "q" else kv_heads) for first, which in self.parts]
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    def rows(self, q_heads: Tensor, kv_heads: Tensor) -> Tensor:
        """The same as indices of single rows: int64 [blocks·block], sorted."""
        blocks = self.blocks(q_heads, kv_heads)
        return (blocks[:, None] * self.block + torch.arange(self.block, device=blocks.device)).flatten()


class HeadParam(NamedTuple):
    """A parameter with a dimension along which heads lie, and whose omitted heads get exactly zero gradient."""

    name: str
    """Dotted name in the model."""
    parameter: nn.Parameter
    dim: int
    kind: Literal["q", "kv", "qkv"]
    """Whose heads: query, key-value, or both in one fused tensor."""
    placement: Placement

    def rows(self, q_heads: Tensor, kv_heads: Tensor) -> Tensor:
        """Indices along `dim` that belong to the kept heads: int64, sorted. Heads: sorted int64 tensors."""
        return self.placement.rows(q_heads, kv_heads)


class GateState:
    """What the slots of one attention share with their `HeadGate`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sparse = False
        self.on_input: Callable[[Tensor], None] | None = None


class _HeadSlot(Slot):
    """Base: a module of the attention whose rows, columns or outputs follow the kept heads."""

    def __init__(self, stock: nn.Module, name: str, state: GateState, placement: Placement | None) -> None:
        super().__init__(stock, name)
        self._slot_state = state
        self._slot_placement = placement
        self._slot_kept: Tensor | None = None

    def keep(self, q_heads: Tensor | None, kv_heads: Tensor | None) -> None:
        """Keep these heads from now on; None forgets the selection."""
        if q_heads is None or kv_heads is None or self._slot_placement is None:
            self._slot_kept = None
        else:
            self._slot_kept = self._slot_placement.blocks(q_heads, kv_heads)

    def _kept(self) -> Tensor:
        if self._slot_kept is None:
            raise ConfigError(
                f"{self._slot_state.name}: configure() asked for fewer heads, but none are selected; call select() "
                "before the forward or from on_input"
            )
        return self._slot_kept


class ProjectionSlot(_HeadSlot):
    """A projection of which only the kept heads' rows (`side="rows"`) or columns (`"cols"`) are computed.

    Without a placement it runs whole, and only tells the gate about the input. The first projection of an attention
    calls the gate's `on_input`.
    """

    def __init__(
        self,
        stock: Linear,
        name: str,
        state: GateState,
        placement: Placement | None,
        *,
        side: Literal["rows", "cols"],
        first: bool,
    ) -> None:
        super().__init__(stock, name, state, placement)
        self._slot_side = side
        self._slot_first = first

    def forward(self, x_BTD: Tensor) -> Tensor:
        state = self._slot_state
        if self._slot_first and state.on_input is not None:
            state.on_input(x_BTD)
        stock, placement = cast("Linear", self.stock), self._slot_placement
        if not state.sparse or placement is None:
            return stock.forward(x_BTD)
        kept = self._kept()
        rows, cols = (kept, None) if self._slot_side == "rows" else (None, kept)
        return subset_linear(x_BTD, weight_OI(stock), stock.bias, rows, cols, block=placement.block)


class JointNormSlot(_HeadSlot):
    """A norm over all heads jointly: runs whole, then hands on the kept heads only."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = self.stock.forward(x_BTD)
        if not self._slot_state.sparse or self._slot_placement is None:
            return y_BTD
        return y_BTD.unflatten(-1, (-1, self._slot_placement.block)).index_select(-2, self._kept()).flatten(-2)
