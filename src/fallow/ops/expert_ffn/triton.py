"""`expert_ffn` on GPUs: grouped GEMMs with the gather in their loads (triton_kernels.py), three launches forwards and
five backwards.

Nothing waits for the GPU: sorting is done there, and programs beyond the last row end at once. The obvious
alternative, `torch.nn.functional.grouped_mm`, needs the K-fold copy of x and of dy, passes of their own for everything
elementwise, and gradients that are contiguous [E, ...]. Tested without a GPU: value and gradients under Triton's
interpreter (TRITON_INTERPRET=1) in fp32 and fp16 (its dot has no bf16). Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fallow.ops.expert_ffn.order import Order
from fallow.ops.gpu import available, interpreted, runs_on

if TYPE_CHECKING:
    from fallow.ops.expert_ffn.op import Gradients

__all__ = ["DTYPES", "available", "backward", "forward", "name", "pad", "sort", "usable"]

name = "triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Weights = tuple[Tensor | None, Tensor, Tensor]


def usable(x: Tensor) -> tuple[bool, str]:
    """Whether `x` can be served here, and why (not)."""
    if not (found := runs_on(x))[0]:
        return found
    if x.dtype not in DTYPES:
        return False, f"x is {x.dtype}; kernels know bfloat16, float16 and float32"
    return True, "grouped GEMMs over tokens sorted by expert"


def pad(dtype: torch.dtype) -> int:
    """Rows of an expert are a multiple of this: the rows of one program (`triton_kernels.BM`)."""
    return 16 if interpreted() else 64


def sort(choice_TK: Tensor, pad: int, order: Order) -> None:
    """Fill `order` on its device, without waiting for it: an expert out of range is not noticed."""
    flat, E = choice_TK.reshape(-1), order.count_E.shape[0]
    torch.sum(flat[:, None] == torch.arange(E, device=flat.device), 0, out=order.count_E)
    order.start_E1[0] = 0
    torch.cumsum((order.count_E + pad - 1) // pad * pad, 0, out=order.start_E1[1:])
    expert_N, choice_N = torch.sort(flat, stable=True)
    tight_E = order.count_E.cumsum(0) - order.count_E
    row_N = torch.arange(len(flat), device=flat.device) + (order.start_E1[:-1] - tight_E)[expert_N]
    order.slot_TK.view(-1)[choice_N] = row_N
    order.token_R[row_N] = choice_N // choice_TK.shape[1]


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Every buffer a kernel is to fill comes from here, so that tests can poison it."""
    return like.new_empty(shape, dtype=dtype)


def _expert_of_block(order: Order, block: int) -> Tensor:
    """int32: the expert of each block of rows, -1 beyond the last."""
    rows, E = order.token_R.shape[0], order.count_E.shape[0]
    first = torch.arange(0, rows, block, device=order.start_E1.device)
    expert = torch.bucketize(first, order.start_E1[1:], right=True)
    return torch.where(expert < E, expert, -1).int()


def _precision() -> str:
    """fp32 products as torch.mm is set to do them."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _combine(rows_RD: Tensor, order: Order, bias: Tensor | None, out_TD: Tensor) -> None:
    from fallow.ops.expert_ffn.triton_kernels import combine_kernel

    T, D = out_TD.shape
    block = min(1024, 1 << (D - 1).bit_length())
    bias = None if bias is None else bias.contiguous()
    grid = (T, -(-D // block))
    combine_kernel[grid](rows_RD, order.slot_TK, bias, out_TD, D, order.slot_TK.shape[1], BLOCK=block)  # type: ignore[arg-type]


def _strides(w: Tensor | None) -> tuple[int, int]:
    return (0, 0) if w is None else (w.stride(0), w.stride(1))


def forward(
    x_TD: Tensor,
    order: Order,
    weights: Weights,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    act: str,
    gate_RC: Tensor,
    up_RC: Tensor,
) -> Tensor:
    """y [T, D]; fills gate_RC (unless there is no gate) and up_RC with the preactivations of the rows in use."""
    from fallow.ops.expert_ffn.triton_kernels import BM, down_kernel, inner_kernel

    (w_gate, w_up, w_down), (b_gate, b_up, b_down) = weights, biases
    (T, D), C, gated = x_TD.shape, up_RC.shape[1], w_gate is not None
    y_TD = _empty(x_TD, T, D)
    if T == 0:
        return y_TD
    b_gate, b_up = (None if b is None else b.contiguous() for b in (b_gate, b_up))
    with torch.cuda.device_of(x_TD):
        blocks = _expert_of_block(order, BM)
        where = (blocks, order.start_E1, order.count_E)
        shared = {"GATED": gated, "PRECISION": _precision(), "BM": BM}
        inner_kernel[lambda meta: (len(blocks), -(-C // meta["BN"]))](
            x_TD, order.token_R, *where, w_gate, w_up, b_gate, b_up, gate_RC, up_RC, D, C,
            *_strides(w_gate), *_strides(w_up), **shared,
        )  # fmt: skip
        rows_RD = _empty(x_TD, up_RC.shape[0], D)
        down_kernel[lambda meta: (len(blocks), -(-D // meta["BN"]))](
            gate_RC, up_RC, *where, w_down, rows_RD, D, C, *_strides(w_down), ACT=act, **shared
        )
        _combine(rows_RD, order, b_down, y_TD)
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
    from fallow.ops.expert_ffn.triton_kernels import BM, hidden_grad_kernel, input_grad_kernel

    w_gate, w_up, w_down = weights
    (T, D), (R, C), gated = x_TD.shape, up_RC.shape, w_gate is not None
    if T == 0:
        for g in gradients:
            if g is not None:
                g.zero_()
        return
    with torch.cuda.device_of(x_TD):
        blocks = _expert_of_block(order, BM)
        where = (blocks, order.start_E1, order.count_E)
        shared = {"GATED": gated, "PRECISION": _precision(), "BM": BM}
        h, dup = _empty(x_TD, R, C), _empty(x_TD, R, C)
        dgate = _empty(x_TD, R, C) if gated else None
        # one row for each block of columns; the narrowest block is 16 under the interpreter, 64 on a GPU
        dot_JR = torch.zeros(-(-C // min(BM, 64)), R, device=x_TD.device)
        hidden_grad_kernel[lambda meta: (len(blocks), -(-C // meta["BN"]))](
            dy_TD, order.token_R, *where, w_down, gate_RC, up_RC, h, dgate, dup, dot_JR, D, C, R,
            *_strides(w_down), ACT=act, **shared,
        )  # fmt: skip
        if gradients.coefficient_TK is not None:
            dot_R = dot_JR.sum(0)
            gradients.coefficient_TK.copy_(dot_R[order.slot_TK])
        if gradients.w_up_FD is not None:
            assert gradients.w_down_DF is not None
            _weight_grad(dup, x_TD, order, gradients.w_up_FD)
            _weight_grad(h, dy_TD, order, gradients.w_down_DF.t())
            if dgate is not None and gradients.w_gate_FD is not None:
                _weight_grad(dgate, x_TD, order, gradients.w_gate_FD)
        for db, dz in ((gradients.b_gate_F, dgate), (gradients.b_up_F, dup)):
            if db is not None and dz is not None:
                _bias_grad(dz, order, db)
        if gradients.x_TD is not None:
            rows_RD = _empty(x_TD, R, D)
            input_grad_kernel[lambda meta: (len(blocks), -(-D // meta["BN"]))](
                dgate, dup, *where, w_gate, w_up, rows_RD, D, C, *_strides(w_gate), *_strides(w_up), **shared
            )
            _combine(rows_RD, order, None, gradients.x_TD)


def _weight_grad(z_RC: Tensor, source_TD: Tensor, order: Order, out_FD: Tensor) -> None:
    from fallow.ops.expert_ffn.triton_kernels import weight_grad_kernel

    D, C, E = source_TD.shape[1], z_RC.shape[1], order.count_E.shape[0]
    weight_grad_kernel[lambda meta: (-(-C // meta["BI"]) * -(-D // meta["BJ"]), E)](
        z_RC, source_TD, order.token_R, order.start_E1, order.count_E, out_FD, D, C, *_strides(out_FD),
        PRECISION=_precision(),
    )  # fmt: skip


def _bias_grad(z_RC: Tensor, order: Order, out_F: Tensor) -> None:
    """out[e·C + c] = the sum of z[r, c] over the rows of expert e."""
    slot_N = order.slot_TK.view(-1)
    expert_N = torch.bucketize(slot_N, order.start_E1[1:], right=True)
    total_EC = torch.zeros(order.count_E.shape[0], z_RC.shape[1], device=z_RC.device)
    total_EC.index_add_(0, expert_N, z_RC[slot_N].float())
    out_F.copy_(total_EC.view(-1))
