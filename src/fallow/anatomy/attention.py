"""`AttentionView`: one attention of a model, and `HeadGate`: the same attention with fewer heads.

The stock attention forward runs untouched, whatever its kernel (eager, SDPA, flash, flex, a registered one):
transformers writes `.view(*shape, -1, head_dim)`, so when the projections return fewer heads, fewer are attended to.
Only the projections are swapped, for slots that compute the kept rows (q, k, v) or columns (o); attributes that hold a
number of heads are set while heads are omitted, and restored. Rewriting each family's attention would be the
alternative.

Cost with n of H query heads and m of G KV heads kept: the projections fall by n/H and m/G, the attention by n/H. Where
a norm spans all heads (OLMo2), q and k are projected in full, and only v, o and the attention shrink.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fallow.anatomy.families import AttentionLayout
from fallow.anatomy.heads import GateState, HeadParam, JointNormSlot, Placement, ProjectionSlot
from fallow.anatomy.linear import Linear, as_linear, out_dim, output_parameters, weight_OI, weight_parameter
from fallow.anatomy.slot import Slot
from fallow.errors import ConfigError, UnsupportedModelError

_Kind = Literal["q", "kv", "qkv"]


class AttentionView:
    """One self-attention. Attributes:

    name: dotted name of the attention module; layer: index of its decoder layer.
    n_heads, n_kv_heads, head_dim: query heads H, KV heads G (equal to H without GQA), width of one head.
    """

    def __init__(self, *, name: str, layer: int, module: nn.Module, layout: AttentionLayout) -> None:
        self.name, self.layer, self.module = name, layer, module
        self._layout = layout
        self._gate: HeadGate | None = None
        self.head_dim: int = getattr(module, layout.head_dim)
        for part in (p for p in (layout.q, layout.k, layout.v, layout.qkv, layout.o) if p):
            self.part(part)
        n_in = weight_OI(self.part(layout.o)).shape[1]
        self.n_heads: int = n_in // self.head_dim
        if layout.qkv is None:
            rows = weight_OI(self.part(cast(str, layout.k))).shape[0]
        else:
            rows = (weight_OI(self.part(layout.qkv)).shape[0] - n_in) // 2
        self.n_kv_heads: int = rows // self.head_dim
        exact = n_in == self.n_heads * self.head_dim and rows == self.n_kv_heads * self.head_dim
        if not exact or not self.n_kv_heads or self.n_heads % self.n_kv_heads:
            raise UnsupportedModelError(
                f"{name}: {n_in} query and {rows} key columns are no whole heads of head_dim {self.head_dim}, or the "
                "query heads do not divide over the KV heads; this is not the attention anatomy/families.py describes"
            )

    def part(self, part: str) -> Linear:
        """A projection's stock module, installed or not."""
        module = self.module._modules[part]
        return as_linear(cast(nn.Module, module.stock if isinstance(module, Slot) else module), self.name, part)

    def placements(self) -> list[tuple[str, Placement, _Kind]]:
        """(projection, blocks, whose) of the query, key and value projections, the one called first in front."""
        layout, d = self._layout, self.head_dim
        if layout.qkv is None:
            query, key, value = cast("tuple[str, str, str]", (layout.q, layout.k, layout.v))
            kv = Placement(d, ((0, "kv"),))
            return [(query, Placement(d, ((0, "q"),)), "q"), (key, kv, "kv"), (value, kv, "kv")]
        if layout.qkv_order == "by head":
            return [(layout.qkv, Placement(3 * d, ((0, "q"),)), "qkv")]
        runs: tuple[tuple[int, Literal["q", "kv"]], ...] = (
            (0, "q"),
            (self.n_heads, "kv"),
            (self.n_heads + self.n_kv_heads, "kv"),
        )
        return [(layout.qkv, Placement(d, runs), "qkv")]

    def whole(self) -> tuple[str, ...]:
        """Projections that must run whole because a norm over all heads follows them."""
        return () if self._layout.joint_norms is None else cast("tuple[str, str]", (self._layout.q, self._layout.k))

    def norm_placements(self) -> list[tuple[str, Placement, Literal["q", "kv"]]]:
        """The same as `placements` for norms over all heads, where there are any."""
        kinds: tuple[Literal["q", "kv"], ...] = ("q", "kv")
        norms = self._layout.joint_norms or ()
        return [(n, Placement(self.head_dim, ((0, k),)), k) for n, k in zip(norms, kinds, strict=False)]

    @property
    def o_placement(self) -> tuple[str, Placement]:
        """The output projection; its columns follow the query heads."""
        return self._layout.o, Placement(self.head_dim, ((0, "q"),))

    def parameters_along_heads(self) -> list[HeadParam]:
        """Every parameter of which a head owns rows, columns or entries that get no gradient when it is omitted.

        Not the output bias, nor projections under a norm over all heads: every row of those gets gradient through it.
        """
        found: list[HeadParam] = []
        for part, placement, kind in self.placements():
            if part not in self.whole():
                module = self.part(part)
                for name, parameter, dim in output_parameters(module):
                    found.append(HeadParam(f"{self.name}.{part}.{name}", parameter, dim, kind, placement))
        for part, placement, kind in self.norm_placements():
            weight = cast(nn.Parameter, cast(nn.Module, self.module._modules[part]).weight)
            found.append(HeadParam(f"{self.name}.{part}.weight", weight, 0, kind, placement))
        part, placement = self.o_placement
        o = self.part(part)
        found.append(HeadParam(f"{self.name}.{part}.weight", weight_parameter(o), 1 - out_dim(o), "q", placement))
        return found

    def v_weight(self) -> Tensor:
        """[n_kv_heads·head_dim, D], read now; KV head by KV head."""
        layout = self._layout
        if layout.qkv is None:
            return weight_OI(self.part(cast(str, layout.v)))
        w = weight_OI(self.part(layout.qkv))
        if layout.qkv_order == "by head":
            return w.unflatten(0, (self.n_heads, 3, self.head_dim))[:, 2].flatten(0, 1)
        return w[-self.n_kv_heads * self.head_dim :]

    def o_weight(self) -> Tensor:
        """[D, n_heads·head_dim], read now."""
        return weight_OI(self.part(self._layout.o))

    def install(self) -> HeadGate:
        """Swap the projections for ones that can omit heads; dense until `HeadGate.configure` says otherwise.

        Raises:
            ConfigError: installed already. UnsupportedModelError: something replaced a projection's forward.
        """
        if self._gate is not None:
            raise ConfigError(f"{self.name} has a head gate already; call uninstall() first")
        self._gate = HeadGate(self, self._layout.head_attributes)
        return self._gate

    def uninstall(self) -> None:
        """Put the very same stock modules and attributes back. Does nothing when nothing is installed."""
        if self._gate is not None:
            self._gate.configure(None, None)
            self._gate.detach()
            self._gate = None


class HeadGate:
    """Chooses which heads of one attention are computed. Made by `AttentionView.install`."""

    def __init__(self, view: AttentionView, head_attributes: tuple[str, ...]) -> None:
        self._view, self._attributes = view, head_attributes
        self._state = GateState(view.name)
        self._saved: dict[str, object] = {}
        self._counts: tuple[int, int] | None = None
        self._slots: list[ProjectionSlot | JointNormSlot] = []
        children: list[str] = []
        for i, (part, placement, _) in enumerate(view.placements()):
            used = None if part in view.whole() else placement
            self._slots.append(
                ProjectionSlot(view.part(part), f"{view.name}.{part}", self._state, used, side="rows", first=i == 0)
            )
            children.append(part)
        for part, placement, _ in view.norm_placements():
            norm = cast(nn.Module, view.module._modules[part])
            self._slots.append(JointNormSlot(norm, f"{view.name}.{part}", self._state, placement))
            children.append(part)
        part, placement = view.o_placement
        self._slots.append(
            ProjectionSlot(view.part(part), f"{view.name}.{part}", self._state, placement, side="cols", first=False)
        )
        for slot, child in zip(self._slots, [*children, part], strict=True):
            slot.place(view.module, child)

    @property
    def on_input(self) -> Callable[[Tensor], None] | None:
        """Called, if set, with the attention's input [B, T, D] before anything is projected; may call `select`."""
        return self._state.on_input

    @on_input.setter
    def on_input(self, callback: Callable[[Tensor], None] | None) -> None:
        self._state.on_input = callback

    def configure(self, n_q: int | None, n_kv: int | None) -> None:
        """Keep `n_q` query and `n_kv` KV heads from now on; (None, None) is dense, exactly the stock attention.

        A change forgets the selection. Raises ConfigError when the counts are out of range or do not divide.
        """
        counts = None if n_q is None or n_kv is None else (n_q, n_kv)
        if counts is None and (n_q is not None or n_kv is not None):
            raise ConfigError(f"{self._view.name}: give both n_q and n_kv, or None for both")
        if counts is not None:
            self._check(*counts)
        if counts == self._counts:
            return
        self._restore()
        for slot in self._slots:
            slot.keep(None, None)
        self._counts, self._state.sparse = counts, counts is not None
        if counts is not None:
            for name in self._attributes:
                self._set(name, *counts)

    def _check(self, n_q: int, n_kv: int) -> None:
        view = self._view
        per_group = view.n_heads // view.n_kv_heads
        if not (0 < n_kv <= view.n_kv_heads) or n_q <= 0 or n_q % n_kv or n_q // n_kv > per_group:
            raise ConfigError(
                f"{view.name}: cannot keep {n_q} query and {n_kv} KV heads of {view.n_heads} and {view.n_kv_heads}; "
                f"keep 1 to {view.n_kv_heads} KV heads and the same number, 1 to {per_group}, of query heads for each"
            )

    def _set(self, name: str, n_q: int, n_kv: int) -> None:
        module = self._view.module
        attribute, _, field = name.partition(".")
        self._saved[attribute] = getattr(module, attribute)
        if field:
            # The attention alone must see fewer heads; the model and other layers share the config object.
            config = copy.copy(self._saved[attribute])
            setattr(config, field, n_q)
            setattr(module, attribute, config)
            return
        values = {
            "num_key_value_groups": n_q // n_kv,
            "num_heads": n_q,
            "num_key_value_heads": n_kv,
            "split_size": n_q * self._view.head_dim,
        }
        setattr(module, attribute, values[attribute])

    def _restore(self) -> None:
        for attribute, value in self._saved.items():
            setattr(self._view.module, attribute, value)
        self._saved = {}

    def select(self, q_heads: Tensor, kv_heads: Tensor) -> None:
        """Compute these heads from now on.

        Args:
            q_heads: int64 [n_q], sorted, as many for each kept KV head, on the weights' device.
            kv_heads: int64 [n_kv], sorted: the KV heads that the query heads belong to.

        Raises:
            ConfigError: other counts than configured, or query heads that do not lie under the KV heads (on an
                accelerator the latter is an assertion on the device, so that nothing waits for it).
        """
        if self._counts is None or self._counts != (len(q_heads), len(kv_heads)):
            raise ConfigError(
                f"{self._view.name}: selected {len(q_heads)} query and {len(kv_heads)} KV heads, configured "
                f"{self._counts or 'dense'}; call configure() with the counts first"
            )
        n_q, n_kv = self._counts
        if not torch.compiler.is_compiling():
            self._check_heads(q_heads, kv_heads, n_q // n_kv)
        for slot in self._slots:
            slot.keep(q_heads, kv_heads)

    def _check_heads(self, q_heads: Tensor, kv_heads: Tensor, ratio: int) -> None:
        per_group = self._view.n_heads // self._view.n_kv_heads
        grouped = (q_heads // per_group == kv_heads.repeat_interleave(ratio)).all()
        sorted_ = (q_heads.diff() > 0).all() & (kv_heads.diff() > 0).all()
        inside = (kv_heads >= 0).all() & (kv_heads < self._view.n_kv_heads).all()
        valid = grouped & sorted_ & inside
        message = (
            f"{self._view.name}: heads must be sorted, distinct and in range, with {ratio} query heads under each KV "
            f"head (query head h lies under KV head h // {per_group})"
        )
        if q_heads.device.type != "cpu":
            torch.ops.aten._assert_async.msg(valid, message)
        elif not valid:
            raise ConfigError(f"{message}; got {q_heads.tolist()} and {kv_heads.tolist()}")

    def detach(self) -> None:
        """Put the stock projections back. Called by `AttentionView.uninstall`."""
        for slot in self._slots:
            slot.remove()
        self._slots = []
