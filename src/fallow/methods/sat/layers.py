"""The two sparse layers of SAT: an FFN over its kept channels, and an attention over its kept heads.

Each holds the choice in force (`kept`) and, when `pending` is set, makes a new one from the input it is about to
compute on. Choosing inside the forward costs no extra pass and sees the very batch it serves; gradient checkpointing
replays the
forward without `pending`, so it meets the same choice again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fallow.methods.sat.importance import Importance, UnitInput, choose, score
from fallow.ops.subset_ffn import naive, subset_ffn

if TYPE_CHECKING:
    from fallow.anatomy import AttentionView, FFNView
    from fallow.methods.sat.config import SAT


def sample_rows(x_ND: Tensor, n: int) -> Tensor:
    """At most `n` rows of [N, D], evenly spaced over the batch."""
    x_ND = x_ND.detach()
    return x_ND if x_ND.shape[0] <= n else x_ND[:: x_ND.shape[0] // n][:n]


class Selector:
    """What the FFN and the attention of a layer have in common: when to choose, and with which random numbers."""

    def __init__(self, config: SAT, importance: Importance, layer: int, salt: int) -> None:
        self.config = config
        self.importance = importance
        self.layer = layer
        self.salt = salt
        self.step = 0
        self.keep: int | None = None  # how many units stay; None is dense
        self.kept: Tensor | None = None
        self.pending = False
        self.seconds = 0.0

    def generator(self, sequence: int = 0) -> torch.Generator:
        seed = hash((self.config.seed, self.step, self.layer, self.salt, sequence)) & 0x7FFFFFFFFFFFFFFF
        return torch.Generator().manual_seed(seed)

    def set_keep(self, keep: int | None, step: int) -> None:
        """The number of kept units from this step on; a changed number calls for a new choice."""
        self.step = step
        if keep != self.keep:
            self.keep, self.kept, self.pending = keep, None, keep is not None

    def _choose(self, unit: Callable[[torch.Generator], UnitInput], sequence: int = 0) -> Tensor:
        assert self.keep is not None
        generator = self.generator(sequence)
        scores = score(self.importance, unit(generator))
        return choose(scores, self.keep, selection=self.config.selection, generator=generator)


class SparseFFN(Selector):
    """Stands where the FFN stood: `forward(x_BTD) -> y_BTD`."""

    def __init__(self, view: FFNView, config: SAT, importance: Importance) -> None:
        super().__init__(config, importance, view.layer, salt=0)
        self.view = view
        self.active = False  # set by the method: training, in sparse mode, rate above 0
        self.dense_mask_N: Tensor | None = None  # tokens of this micro-batch that pass through every channel
        # torch types `disable` as a decorator factory too
        self._select: Callable[[Tensor], None] = torch.compiler.disable(self._select_now)  # pyright: ignore[reportAttributeAccessIssue]
        view.install(self.forward)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if not self.active or self.keep is None:
            return self.view.dense(x_BTD)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        if self.pending:
            self._select(x_BTD)
        if self.dense_mask_N is None:
            return self._run(x_ND, self.kept).view(x_BTD.shape)
        return self._split(x_ND).view(x_BTD.shape)

    def _run(self, x: Tensor, kept: Tensor | None) -> Tensor:
        if kept is None:
            return self.view.dense(x)
        w = self.view.weights()
        return subset_ffn(
            x,
            w.w_up_FD,
            w.w_down_DF,
            kept,
            w_gate_FD=w.w_gate_FD,
            b_gate_F=w.b_gate_F,
            b_up_F=w.b_up_F,
            b_down_D=w.b_down_D,
            act=self.view.act,
            omit_in=self.config.omit_in,
        )

    def _split(self, x_ND: Tensor) -> Tensor:
        """Loss-bearing tokens through every channel, the others through the kept ones."""
        mask = self.dense_mask_N
        assert mask is not None
        if mask.shape[0] != x_ND.shape[0]:
            raise RuntimeError(f"SAT: {mask.shape[0]} labels for {x_ND.shape[0]} tokens in layer {self.layer}")
        dense_n, sparse_n = mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)
        parts = [self._run(x_ND[dense_n], None)] if len(dense_n) else []
        if len(sparse_n):
            parts.append(self._run(x_ND[sparse_n], self.kept))
        order = torch.cat([dense_n, sparse_n])
        return torch.empty_like(x_ND).index_copy(0, order, torch.cat(parts))

    @torch.no_grad()
    def _select_now(self, x_BTD: Tensor) -> None:
        began = time.perf_counter()
        w = self.view.weights()
        F = self.view.n_channels

        def hidden(x: Tensor) -> Tensor:
            up = torch.nn.functional.linear(x, w.w_up_FD, w.b_up_F)
            if w.w_gate_FD is None:
                return naive.activation(up, self.view.act)
            return naive.activation(torch.nn.functional.linear(x, w.w_gate_FD, w.b_gate_F), self.view.act).mul_(up)

        w_in = (w.w_up_FD,) if w.w_gate_FD is None else (w.w_gate_FD, w.w_up_FD)

        def unit(x: Tensor) -> Callable[[torch.Generator], UnitInput]:
            sampled = sample_rows(x, self.config.sample_tokens)
            return lambda g: UnitInput(
                x_SD=sampled, w_in=w_in, w_out=w.w_down_DF, hidden=hidden, n_units=F, generator=g
            )

        if self.config.scope == "sequence" and x_BTD.dim() == 3:
            self.kept = torch.stack([self._choose(unit(x), s) for s, x in enumerate(x_BTD)])
        else:
            self.kept = self._choose(unit(x_BTD.reshape(-1, x_BTD.shape[-1])))
        self.pending = False
        self.seconds += time.perf_counter() - began


class SparseAttention(Selector):
    """Steers the `HeadGate` of an attention. A unit is a KV group with its query heads, or one query head of a
    group."""

    def __init__(self, view: AttentionView, config: SAT, importance: Importance) -> None:
        super().__init__(config, importance, view.layer, salt=1)
        self.view = view
        self.gate = view.install()
        self.gate.on_input = torch.compiler.disable(self._on_input)  # pyright: ignore[reportAttributeAccessIssue]
        self.per_group = view.n_heads // view.n_kv_heads
        self.n_units = view.n_kv_heads if config.head_unit == "group" else self.per_group
        self.running = False

    def activate(self, active: bool) -> None:
        """Switch the gate between dense and the kept heads; called outside the forward only."""
        self.running = active and self.keep is not None
        if not self.running:
            self.gate.configure(None, None)
            return
        assert self.keep is not None
        if self.config.head_unit == "group":
            self.gate.configure(self.keep * self.per_group, self.keep)
        else:
            self.gate.configure(self.keep * self.view.n_kv_heads, self.view.n_kv_heads)
        if self.kept is not None:
            self.gate.select(*self.heads(self.kept))

    def heads(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """(query heads, KV heads) of the kept units: [K] groups, or [KV, K] query slots, one row per group."""
        kv = self.view.n_kv_heads
        if self.config.head_unit == "group":
            slots = torch.arange(self.per_group, device=kept.device)
            return (kept[:, None] * self.per_group + slots).flatten(), kept
        groups = torch.arange(kv, device=kept.device)
        return (groups[:, None] * self.per_group + kept).flatten(), groups

    @torch.no_grad()
    def _on_input(self, x_BTD: Tensor) -> None:
        if not (self.running and self.pending):
            return
        began = time.perf_counter()
        view = self.view
        x = sample_rows(x_BTD.reshape(-1, x_BTD.shape[-1]), self.config.sample_tokens)
        w_v, w_o = view.v_weight(), view.o_weight()
        if self.config.head_unit == "query":
            # a query head shares its group's v; what tells the heads of a group apart is their own slice of o
            w_v = (
                w_v.view(view.n_kv_heads, 1, view.head_dim, -1)
                .expand(-1, self.per_group, -1, -1)
                .reshape(view.n_heads * view.head_dim, -1)
            )
        n = view.n_kv_heads if self.config.head_unit == "group" else view.n_heads

        def unit(g: torch.Generator) -> UnitInput:
            return UnitInput(x_SD=x, w_in=(w_v,), w_out=w_o, hidden=lambda t: t @ w_v.t(), n_units=n, generator=g)

        if self.config.head_unit == "group":
            self.kept = self._choose(unit)
        else:
            assert self.keep is not None
            generator = self.generator()
            scores = score(self.importance, unit(generator)).view(view.n_kv_heads, self.per_group)
            self.kept = torch.stack(
                [choose(s, self.keep, selection=self.config.selection, generator=generator) for s in scores]
            )
        self.gate.select(*self.heads(self.kept))
        self.pending = False
        self.seconds += time.perf_counter() - began
