"""`expert_ffn` on CPUs: each thread takes whole experts and runs torch's GEMMs on slices of the weights where they lie.

A thread gathers an expert's rows of x, and while they are in its cache runs everything the expert has to do with them
(ops/workers.py says why not one GEMM after the other on all threads). Weight gradients are written by the GEMMs into
their slices of the full-size gradients, so nothing is filled with zeros but experts without a token. What is not a GEMM
is native/expert.cpp: gather, the hidden layer in one pass forwards and one backwards, and the sum of a token's K rows,
in fp32, without atomics. The obvious alternative, `torch.nn.functional.grouped_mm`, wants the weights as [E, D, C], the
whole K-fold x and zeroed gradients.

Workspace, kept from call to call (ops/reuse.py): T·K·D elements, and per thread 2·N·D + 3·N·C for an expert of N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fallow.errors import ConfigError
from fallow.ops import native, reuse
from fallow.ops.activation import ACTIVATIONS
from fallow.ops.expert_ffn.order import Order
from fallow.ops.workers import share_out

if TYPE_CHECKING:
    from fallow.ops.expert_ffn.op import Gradients

name = "cpu"

_SMALL = 1 << 22  # multiplications under which handing over costs more than it saves
Weights = tuple[Tensor | None, Tensor, Tensor]


@torch.compiler.assume_constant_result  # the compiler cannot look into loading a library
def available() -> tuple[bool, str]:
    """Whether the compiled kernels are there, and why not."""
    return native.available()


def usable(x: Tensor) -> tuple[bool, str]:
    """Whether `x` can be served here, and why not."""
    if x.device.type != "cpu":
        return False, f"x is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float32):
        return False, f"{x.dtype}; served are bfloat16 and float32"
    return True, "GEMMs on slices of the weights"


def pad(dtype: torch.dtype) -> int:
    """Rows of an expert are a multiple of this (order.py)."""
    return 32 if dtype == torch.bfloat16 else 1


def sort(choice_TK: Tensor, pad: int, order: Order) -> None:
    """Fill `order`. Raises ConfigError when an expert is out of range."""
    experts = order.count_E.shape[0]
    native.library().fallow_expert_sort(
        choice_TK.data_ptr(), *choice_TK.shape, experts, pad, *(_address(t) for t in order)
    )
    if int(order.start_E1[-1]) < 0:
        raise ConfigError(
            f"expert_ffn: choice has experts from {int(choice_TK.min())} to {int(choice_TK.max())}; there are"
            f" 0 to {experts - 1}"
        )


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _gather(x_TD: Tensor, token: Tensor, out: Tensor) -> Tensor:
    """out[r] = x[token[r]], and zeros in the rows beyond them."""
    row_bytes = x_TD.shape[1] * x_TD.element_size()
    native.library().fallow_expert_gather(
        *(_address(t) for t in (out, x_TD, token)), len(token), len(out), row_bytes, 1
    )
    return out


def _combine(rows_RD: Tensor, order: Order, bias: Tensor | None, out_TD: Tensor) -> None:
    bias = None if bias is None else bias.contiguous()
    native.library().fallow_expert_combine(
        *(_address(t) for t in (out_TD, rows_RD, order.slot_TK, bias)),
        *order.slot_TK.shape,
        out_TD.shape[1],
        out_TD.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


def _project(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias, x, w.t(), out=out)


class _Experts:
    """What forward and backward share: each expert's rows and its slices of the weights."""

    def __init__(self, x_TD: Tensor, order: Order, act: str, channels: int) -> None:
        self.like, self.order, self.act = x_TD, order, act
        self.starts, self.counts = order.start_E1.tolist(), order.count_E.tolist()
        self.sizes = [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        self.small = self.starts[-1] * x_TD.shape[1] * channels < _SMALL

    def rows(self, whole: Tensor, e: int) -> Tensor:
        """The rows of expert e."""
        return whole[self.starts[e] : self.starts[e + 1]]

    def tokens(self, e: int) -> Tensor:
        return self.order.token_R[self.starts[e] : self.starts[e] + self.counts[e]]

    def of(self, w: Tensor | None, dim: int = 0) -> Sequence[Tensor | None]:
        """Each expert's channels of w, which lie along `dim`."""
        return [None] * len(self.counts) if w is None else w.unflatten(dim, (len(self.counts), -1)).unbind(dim)

    def buffer(self, rows: int, cols: int, use: str, worker: int | None = None) -> Tensor:
        return reuse.empty((rows, cols), self.like.dtype, f"expert_ffn/{use}/{worker}")

    def hidden(self, gate: Tensor | None, up: Tensor, h: Tensor) -> None:
        bf16 = self.like.dtype == torch.bfloat16
        native.library().fallow_expert_hidden(
            *(_address(t) for t in (gate, up, h)), h.numel(), ACTIVATIONS.index(self.act), bf16, 1
        )

    def hidden_backward(
        self, gate: Tensor | None, up: Tensor, dh: Tensor, h: Tensor, dgate: Tensor | None, dot: Tensor
    ) -> None:
        """h, dgate and dot = Σ dh·h of every row; dh becomes the gradient of up."""
        bf16 = self.like.dtype == torch.bfloat16
        addresses = (_address(t) for t in (gate, up, dh, h, dgate, dot))
        native.library().fallow_expert_hidden_backward(*addresses, *up.shape, ACTIVATIONS.index(self.act), bf16, 1)


def forward(
    x_TD: Tensor,
    order: Order,
    weights: Weights,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    act: str,
    gate_RC: Tensor,
    up_RC: Tensor,
) -> Tensor:
    """y [T, D]; fills gate_RC (unless there is no gate) and up_RC with the preactivations of all rows."""
    D, C = x_TD.shape[1], up_RC.shape[1]
    experts = _Experts(x_TD, order, act, C)
    gated = weights[0] is not None
    w_gate, w_up, w_down = experts.of(weights[0]), experts.of(weights[1]), experts.of(weights[2], 1)
    b_gate, b_up = experts.of(biases[0]), experts.of(biases[1])
    rows_RD = experts.buffer(experts.starts[-1], D, "rows")

    def one(e: int, worker: int) -> None:
        n = experts.sizes[e]
        x = _gather(x_TD, experts.tokens(e), experts.buffer(n, D, "x", worker))
        gate, up = experts.rows(gate_RC, e) if gated else None, experts.rows(up_RC, e)
        if gate is not None:
            _project(x, w_gate[e], b_gate[e], gate)  # type: ignore[arg-type]
        _project(x, w_up[e], b_up[e], up)  # type: ignore[arg-type]
        h = experts.buffer(n, C, "h", worker)
        experts.hidden(gate, up, h)
        torch.mm(h, w_down[e].t(), out=experts.rows(rows_RD, e))  # type: ignore[union-attr]

    share_out(one, experts.sizes, inline=experts.small)
    y_TD = torch.empty_like(x_TD)
    _combine(rows_RD, order, biases[2], y_TD)
    return y_TD


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_RC: Tensor,
    up_RC: Tensor,
    order: Order,
    weights: Weights,
    act: str,
    gradients: Gradients,
) -> None:
    """Fill `gradients`, each where it is not None."""
    D, C = x_TD.shape[1], up_RC.shape[1]
    experts = _Experts(x_TD, order, act, C)
    gated = weights[0] is not None
    w_gate, w_up, w_down = experts.of(weights[0]), experts.of(weights[1]), experts.of(weights[2], 1)
    _, _, dw_gate, dw_up, dw_down, db_gate, db_up = gradients
    to_gate, to_up, to_down = experts.of(dw_gate), experts.of(dw_up), experts.of(dw_down, 1)
    to_b_gate, to_b_up = experts.of(db_gate), experts.of(db_up)
    rows_RD = experts.buffer(experts.starts[-1], D, "rows")
    dot_R = torch.empty(up_RC.shape[0])

    def one(e: int, worker: int) -> None:
        n = experts.sizes[e]
        dy = _gather(dy_TD, experts.tokens(e), experts.buffer(n, D, "dy", worker))
        dup, h = experts.buffer(n, C, "dup", worker), experts.buffer(n, C, "h", worker)
        dgate = experts.buffer(n, C, "dgate", worker) if gated else None
        torch.mm(dy, w_down[e], out=dup)  # type: ignore[arg-type]
        gate, up = experts.rows(gate_RC, e) if gated else None, experts.rows(up_RC, e)
        experts.hidden_backward(gate, up, dup, h, dgate, experts.rows(dot_R, e))
        if dw_up is not None:
            torch.mm(dy.t(), h, out=to_down[e])  # type: ignore[arg-type]
            x = _gather(x_TD, experts.tokens(e), experts.buffer(n, D, "x", worker))
            torch.mm(dup.t(), x, out=to_up[e])  # type: ignore[arg-type]
            if dgate is not None:
                torch.mm(dgate.t(), x, out=to_gate[e])  # type: ignore[arg-type]
        for db, dz in ((to_b_up[e], dup), (to_b_gate[e], dgate)):
            if db is not None and dz is not None:
                torch.sum(dz, 0, out=db)
        if gradients.x_TD is not None:
            dx = torch.mm(dup, w_up[e], out=experts.rows(rows_RD, e))  # type: ignore[arg-type]
            if dgate is not None:
                dx.addmm_(dgate, w_gate[e])  # type: ignore[arg-type]

    share_out(one, experts.sizes, inline=experts.small)
    for e in (e for e, n in enumerate(experts.sizes) if n == 0):
        for part in (to_gate[e], to_up[e], to_down[e], to_b_gate[e], to_b_up[e]):
            if part is not None:
                part.zero_()
    if gradients.coefficient_TK is not None:
        torch.index_select(dot_R, 0, order.slot_TK.view(-1), out=gradients.coefficient_TK.view(-1))
    if gradients.x_TD is not None:
        _combine(rows_RD, order, None, gradients.x_TD)
