"""`subset_ffn` for CPUs: gather the kept channels once, then four ordinary GEMMs on the slice.

Gate and up rows of the kept channels are copied into one reused [2K, D] scratch buffer, so that forward, input gradient
and weight gradient are one GEMM each instead of two. The obvious alternative, `w[idx]` under autograd, scatters every
weight gradient with `index_put_(accumulate=True)` and keeps the gathered copies alive until backward.

Cost, beside 6·T·K·D·3 FLOPs: 3·K·D elements copied per direction, and 3·F·D gradient elements of which only the kept
are written (the rest stay untouched zero pages). At T = 2048 the copies are about 1 % of the arithmetic.
`omit_in="weight_grad"` is in weight_grad.py: three linears, nothing gathered forward.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fallow.ops.activation import activation
from fallow.ops.gather import gather_cols, gather_rows, spread_cols, spread_rows
from fallow.ops.subset_ffn import weight_grad

name = "cpu"
_local = threading.local()


def available() -> tuple[bool, str]:
    return True, "GEMMs on gathered rows"


def usable(x: Tensor) -> tuple[bool, str]:
    if x.device.type == "meta":
        return False, "meta tensors hold no values"
    return True, "GEMMs on gathered rows (any device)"


def _scratch(tag: str, rows: int, cols: int, like: Tensor) -> Tensor:
    """A reused [rows, cols] buffer, one per use, thread, dtype and device; its content dies with the op call."""
    buffers = _local.__dict__.setdefault("buffers", {})
    key = (tag, like.dtype, like.device)
    flat = buffers.get(key)
    if flat is None or flat.numel() < rows * cols:
        flat = buffers[key] = like.new_empty(rows * cols)
    return flat[: rows * cols].view(rows, cols)


def _gather_in(w_gate: Tensor | None, w_up: Tensor, idx: Tensor | None) -> Tensor:
    """[(2)K, D]: kept rows of gate (if any) stacked on kept rows of up."""
    if w_gate is None:
        return w_up if idx is None else gather_rows(w_up, idx, _scratch("in", len(idx), w_up.shape[1], w_up))
    K = w_up.shape[0] if idx is None else len(idx)
    out = _scratch("in", 2 * K, w_up.shape[1], w_up)
    for half, w in ((out[:K], w_gate), (out[K:], w_up)):
        if idx is None:
            half.copy_(w)
        else:
            gather_rows(w, idx, half)
    return out


def _gather_out(w_down: Tensor, idx: Tensor | None) -> Tensor:
    """[D, K]: kept columns of down."""
    if idx is None:
        return w_down
    return gather_cols(w_down, idx, _scratch("out", w_down.shape[0], len(idx), w_down))


def _bias_in(b_gate: Tensor | None, b_up: Tensor | None, idx: Tensor | None, gated: bool) -> Tensor | None:
    if b_up is None and b_gate is None:
        return None
    parts = [b for b in ((b_gate, b_up) if gated else (b_up,)) if b is not None]
    return torch.cat([b if idx is None else b[idx] for b in parts])


def _project(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias, x, w.t())


def _hidden(pre: Tensor, act: str, gated: bool) -> Tensor:
    if not gated:
        return activation(pre, act)
    K = pre.shape[1] // 2
    return activation(pre[:, :K], act).mul_(pre[:, K:])


def _activation_backward(grad: Tensor, z: Tensor, act: str, out: Tensor) -> None:
    """out = grad · act'(z)."""
    if act == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, z, grad_input=out)
    elif act == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, z, 0, grad_input=out)
    elif act == "relu2":
        torch.mul(grad, torch.relu(z).mul_(2), out=out)
    else:
        approximate = "tanh" if act == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(grad, z, approximate=approximate, grad_input=out)


def _groups(x: Tensor, idx: Tensor | None) -> list[tuple[slice, Tensor | None]]:
    """Token slices and the channels each one keeps: one group per batch, or one per sequence."""
    if idx is None or idx.dim() == 1:
        return [(slice(0, x.shape[0]), idx)]
    T = x.shape[0] // idx.shape[0]
    return [(slice(s * T, (s + 1) * T), idx[s]) for s in range(idx.shape[0])]


@torch.library.custom_op("fallow::subset_ffn_cpu", mutates_args=())
def _forward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    idx: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    act: str,
    dense_forward: bool,
) -> tuple[Tensor, Tensor]:
    """(y_TD, pre): `pre` holds the kept preactivations, [T, 2K] when gated (gate, then up), else [T, K]."""
    gated = w_gate is not None
    parts = 2 if gated else 1
    K = w_up.shape[0] if idx is None else idx.shape[-1]
    y = x.new_empty(x.shape[0], w_down.shape[0])
    pre = x.new_empty(x.shape[0], parts * K)
    if dense_forward and idx is not None:
        full = _project(x, _gather_in(w_gate, w_up, None), _bias_in(b_gate, b_up, None, gated))
        torch.mm(_hidden(full, act, gated), w_down.t(), out=y)
        F = w_up.shape[0]
        for tokens, kept in _groups(x, idx):
            assert kept is not None
            for p in range(parts):
                part = full[tokens, p * F : (p + 1) * F]
                pre[tokens, p * K : (p + 1) * K] = gather_cols(part, kept, part.new_empty(part.shape[0], K))
    else:
        for tokens, kept in _groups(x, idx):
            bias = _bias_in(b_gate, b_up, kept, gated)
            w_in = _gather_in(w_gate, w_up, kept)
            if bias is None:
                torch.mm(x[tokens], w_in.t(), out=pre[tokens])
            else:
                torch.addmm(bias, x[tokens], w_in.t(), out=pre[tokens])
            torch.mm(_hidden(pre[tokens], act, gated), _gather_out(w_down, kept).t(), out=y[tokens])
    if b_down is not None:
        y += b_down
    return y, pre


@_forward.register_fake
def _(x, w_up, w_down, idx, w_gate, b_gate, b_up, b_down, act, dense_forward):
    K = w_up.shape[0] if idx is None else idx.shape[-1]
    return x.new_empty(x.shape[0], w_down.shape[0]), x.new_empty(x.shape[0], (1 if w_gate is None else 2) * K)


@torch.library.custom_op("fallow::subset_ffn_cpu_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    idx: Tensor | None,
    w_gate: Tensor | None,
    act: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> list[Tensor]:
    """[dx, dw_up, dw_down, dw_gate, d_bias_in]; what was not asked for is an empty tensor."""
    gated = w_gate is not None
    parts = 2 if gated else 1
    F, K = w_up.shape[0], pre.shape[1] // parts
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw_in = [x.new_empty(0) for _ in range(parts)]
    dw_down = x.new_empty(0)
    db_in = x.new_zeros(parts * F) if need_db else x.new_empty(0)
    dy = dy.contiguous()
    for tokens, kept in _groups(x, idx):
        z, dy_s = pre[tokens], dy[tokens]
        dh = torch.mm(dy_s, _gather_out(w_down, kept))
        if gated:
            gate, up = z[:, :K], z[:, K:]
            a = activation(gate, act)
            dz = torch.empty_like(z)
            torch.mul(dh, a, out=dz[:, K:])
            _activation_backward(dh.mul_(up), gate, act, dz[:, :K])
            h = a.mul_(up)
        else:
            h, dz = activation(z, act), torch.empty_like(z)
            _activation_backward(dh, z, act, dz)
        if need_dx:
            torch.mm(dz, _gather_in(w_gate, w_up, kept), out=dx[tokens])
        if need_dw:
            dw_down = _accumulate(dw_down, 1, kept, torch.mm(dy_s.t(), h), F)
            dw = torch.mm(dz.t(), x[tokens])
            for p in range(parts):
                dw_in[p] = _accumulate(dw_in[p], 0, kept, dw[p * K : (p + 1) * K], F)
        if need_db:
            db = dz.sum(0)
            for p in range(parts):
                where = slice(p * F, (p + 1) * F)
                db_in[where].index_add_(0, torch.arange(F) if kept is None else kept, db[p * K : (p + 1) * K])
    return [dx, dw_in[-1], dw_down, dw_in[0] if gated else x.new_empty(0), db_in]


def _accumulate(full: Tensor, dim: int, kept: Tensor | None, part: Tensor, F: int) -> Tensor:
    """Add a gradient of the kept rows (dim 0) or columns (dim 1) to the full-size one; an empty `full` is zero."""
    if kept is None:
        return part.contiguous() if full.numel() == 0 else full.add_(part)
    if full.numel():
        return full.index_add_(dim, kept, part)
    return (spread_rows if dim == 0 else spread_cols)(part, kept, F)


@_backward.register_fake
def _(dy, x, pre, w_up, w_down, idx, w_gate, act, need_dx, need_dw, need_db):
    none = x.new_empty(0)
    return [
        torch.empty_like(x) if need_dx else none,
        torch.empty_like(w_up, memory_format=torch.contiguous_format) if need_dw else x.new_empty(0),
        torch.empty_like(w_down, memory_format=torch.contiguous_format) if need_dw else x.new_empty(0),
        w_gate.new_empty(w_gate.shape) if need_dw and w_gate is not None else x.new_empty(0),
        x.new_empty((1 if w_gate is None else 2) * w_up.shape[0]) if need_db else x.new_empty(0),
    ]


def _setup(ctx, inputs, output):
    x, w_up, w_down, idx, w_gate, b_gate, b_up, b_down, act, _ = inputs
    ctx.save_for_backward(x, output[1], w_up, w_down, idx, w_gate)
    ctx.act = act
    ctx.biases = (b_gate is not None, b_up is not None, b_down is not None)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, _dpre):
    x, pre, w_up, w_down, idx, w_gate = ctx.saved_tensors
    if dy is None:
        return (None,) * 10
    has_gate, has_up, has_down = ctx.biases
    need = ctx.needs_input_grad
    need_dw = need[1] or need[2] or need[4]
    need_db = (has_gate and need[5]) or (has_up and need[6])
    dx, dw_up, dw_down, dw_gate, db = _backward(
        dy, x, pre, w_up, w_down, idx, w_gate, ctx.act, need[0], need_dw, need_db
    )
    F = w_up.shape[0]
    return (
        dx if need[0] else None,
        dw_up if need[1] else None,
        dw_down if need[2] else None,
        None,
        dw_gate if need[4] else None,
        db[:F] if has_gate and need[5] else None,
        db[-F:] if has_up and need[6] else None,
        dy.sum(0) if has_down and need[7] else None,
        None,
        None,
    )


_forward.register_autograd(_autograd, setup_context=_setup)


def subset_ffn(
    x_TD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    idx_K: Tensor | None,
    *,
    w_gate_FD: Tensor | None = None,
    b_gate_F: Tensor | None = None,
    b_up_F: Tensor | None = None,
    b_down_D: Tensor | None = None,
    act: str = "silu",
    omit_in: str = "forward+backward",
) -> Tensor:
    if omit_in == "weight_grad" and idx_K is not None:
        biases = {"b_gate_F": b_gate_F, "b_up_F": b_up_F, "b_down_D": b_down_D}
        return weight_grad.subset_ffn(x_TD, w_up_FD, w_down_DF, idx_K, w_gate_FD=w_gate_FD, **biases, act=act)
    dense_forward = omit_in == "backward"
    return _forward(x_TD, w_up_FD, w_down_DF, idx_K, w_gate_FD, b_gate_F, b_up_F, b_down_D, act, dense_forward)[0]
