"""`bank_ffn` on GPUs for up to 8 tokens: four launches for one token (triton_select.py: prepare x, choose channels;
triton_kernels.py: the FFN in shares, their sum), five for several (hidden layer and down projection apart); a
compensation is added by PyTorch's GEMMs.

Nothing waits for the GPU and every shape follows from those of the arguments, so that a decoding step fits into a CUDA
graph; kernels tune themselves at the first call of a shape, which must come before the capture. Launches are most of
an eager call's time; where the device can, they overlap (triton_tuning.py). The obvious alternative, one kernel for
all, must let the whole GPU wait between its phases, which costs as much as a launch from a graph. Rows are read where
they lie, side by side too. Tested without a GPU: against naive under Triton's interpreter (TRITON_INTERPRET=1), whose
dot has no bf16 (fp32 there) and which knows no dp4a (plain arithmetic there); all kernels compile for sm_90. On an H200
they passed the gate of benchmarks/gpu_upcycle.py; one token at 3584×18944 takes 42 µs, dense 98 to 114.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (A launch takes options, such as num_warps, that are not in the kernel's signature, and plain values for constants.)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fallow.ops.bank_ffn import naive
from fallow.ops.bank_ffn.select import Int8Rows, Predictor, Weight, tensor_of
from fallow.ops.gpu import available, interpreted, runs_on

__all__ = ["DTYPES", "available", "bank_ffn", "bank_mask", "mask_usable", "name", "usable"]

name = "triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_TOKENS, MOST_BANK = 8, 256
PARTS = 80
"""Most shares of the down projection: with blocks of 128 outputs some 2,000 programs at a width of 3584, so that each
loads all it needs at once. Their sums are a MB, which stays in the L2 cache."""
ONE_KERNEL = True
"""Whether for one token a single kernel reads all three rows of a channel; else the hidden layer comes first and the
down projection after it, as for several tokens."""
MOST_WIDTH = 8192
"""Wider rows do not fit into the registers of that kernel."""
EARLY = True
"""Whether kernels overlap with those before them, where the device can (triton_tuning.py)."""


class Chosen(NamedTuple):
    """Which channels live."""

    coef_TF: Tensor
    """fp32: the factor of each channel, 0 where it is dead."""
    live_NS: Tensor
    """int32: of each bank the channels alive for any token, ascending; the first `count_N`."""
    count_N: Tensor
    """int32."""


def usable(x_TD: Tensor, predictor: Predictor, w_up_FD: Weight, bank: int) -> tuple[bool, str]:
    """Whether these arguments can be served here, and why (not)."""
    if not (found := runs_on(x_TD))[0]:
        return found
    if x_TD.dtype not in DTYPES:
        return False, f"x is {x_TD.dtype}; kernels know bfloat16, float16 and float32"
    if x_TD.shape[0] > MOST_TOKENS:
        return False, f"{x_TD.shape[0]} tokens; up to {MOST_TOKENS} are served"
    if bank > MOST_BANK:
        return False, f"banks of {bank}; up to {MOST_BANK} are served"
    known = (*DTYPES, torch.uint8 if predictor.kind == "quantized" else torch.int8)
    if predictor.tensors[0].dtype not in known:
        return False, f"a predictor in {predictor.tensors[0].dtype}; kernels know {', '.join(map(str, known))}"
    return True, "reads living rows only"


def mask_usable(scores_TF: Tensor, bank: int) -> tuple[bool, str]:
    """Whether `bank_mask` can be served here, and why (not)."""
    if not (found := runs_on(scores_TF))[0]:
        return found
    if scores_TF.dtype not in DTYPES:
        return False, f"scores are {scores_TF.dtype}; kernels know bfloat16, float16 and float32"
    if bank > MOST_BANK:
        return False, f"banks of {bank}; up to {MOST_BANK} are served"
    return True, "counts ranks"


def bank_mask(scores_TF: Tensor, *, bank: int, keep: int) -> Tensor:
    """As `fallow.ops.bank_ffn.bank_mask`."""
    from fallow.ops.bank_ffn.triton_select import mask_kernel

    scores_TF = scores_TF.contiguous()
    out_TF = torch.empty(scores_TF.shape, dtype=torch.bool, device=scores_TF.device)
    banks = scores_TF.numel() // bank
    if banks:
        BB = _power_of_2(bank)
        with torch.cuda.device_of(scores_TF):
            mask_kernel[(banks,)](scores_TF, out_TF.view(torch.uint8), keep, BANK=bank, BB=BB, num_warps=_warps(BB))
    return out_TF


def bank_ffn(
    x_TD: Tensor,
    predictor: Predictor,
    w_gate_FD: Weight,
    w_up_FD: Weight,
    w_down_FD: Weight,
    *,
    act: str,
    bank: int,
    keep: int,
) -> Tensor:
    """Arguments as `fallow.ops.bank_ffn.bank_ffn`, x as [T, D]."""
    x_TD = x_TD.contiguous()
    y_TD = _empty(x_TD, *x_TD.shape)
    if x_TD.shape[0]:
        with torch.cuda.device_of(x_TD):
            chosen = choose(x_TD, predictor, tensor_of(w_up_FD).shape[0], act=act, bank=bank, keep=keep)
            _living_rows(x_TD, chosen, (w_gate_FD, w_up_FD, w_down_FD), act, y_TD)
    return naive.compensated(y_TD, x_TD, predictor)


def choose(x_TD: Tensor, predictor: Predictor, channels: int, *, act: str, bank: int, keep: int) -> Chosen:
    """The living channels of up to 8 tokens, two launches (one, where scores are given)."""
    from fallow.ops.bank_ffn import triton_select as kernels

    (T, D), F = x_TD.shape, channels
    kind, tensors, tilt_F, gate = predictor[:4]
    banks, slots, BB = F // bank, min(bank, T * keep), _power_of_2(bank)
    chosen = Chosen(
        _empty(x_TD, T, F, dtype=torch.float32),
        _empty(x_TD, banks, slots, dtype=torch.int32),
        _empty(x_TD, banks, dtype=torch.int32),
    )
    tail = (None if tilt_F is None else tilt_F.float().contiguous(), *chosen, F)
    tiles = {"T": T, "BANK": bank, "BB": BB}
    smooth, early = gate == "smooth", _early(x_TD)
    tensors = tuple(t.contiguous() for t in tensors)
    if kind == "scores":
        kernels.given_kernel[(banks,)](
            tensors[0], *tail, keep, slots, SMOOTH=smooth, **tiles, **early, num_warps=_warps(BB)
        )
    elif kind == "quantized":
        codes, scales = tensors
        _, G, _, bits, twice = codes.shape
        group = twice // 2
        J = group * bits // 32
        words = _empty(x_TD, T, G * J, 8 // bits, dtype=torch.int32)
        zero, scale = _empty(x_TD, T, G * J, dtype=torch.int32), _empty(x_TD, T, G, dtype=torch.float32)
        kernels.round_kernel[(G, T)](
            x_TD, words, zero, scale, D, G, GROUP=group, BITS=bits, J=J, BJ=_power_of_2(J),
            **early, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
        kernels.codes_kernel[(banks,)](
            words, zero, scale, codes.view(torch.int32), scales, *tail, G * J, keep, slots,
            ACT=act, BITS=bits, J=J, PLAIN=interpreted(), **tiles, **early,
        )  # fmt: skip
    else:
        v_gate, s_v_gate, u_gate, s_u_gate, v_up, s_v_up, u_up, s_u_up = _factors(tensors)
        R = v_gate.shape[0]
        z = _empty(x_TD, 1 if v_up is None else 2, T, R, dtype=torch.float32)
        kernels.thin_kernel[lambda meta: (-(-R // meta["BR"]), z.shape[0])](
            x_TD, v_gate, v_up, s_v_gate, s_v_up, z, D, R, T=T, **early
        )
        kernels.factors_kernel[(banks,)](
            z, u_gate, u_up, s_u_gate, s_u_up, *tail, R, keep, slots, ACT=act, SMOOTH=smooth, **tiles, **early
        )
    return chosen


def _factors(tensors: tuple[Tensor, ...]) -> list[Any]:
    """(V, scale, U, scale) of gate and of up; None for what there is not."""
    if tensors[0].dtype != torch.int8:
        tensors = tuple(t for factor in tensors for t in (factor, None))  # type: ignore[assignment]
    return [*tensors, *[None] * (8 - len(tensors))]


def _living_rows(x_TD: Tensor, chosen: Chosen, weights: tuple[Weight, Weight, Weight], act: str, y_TD: Tensor) -> None:
    from fallow.ops.bank_ffn import triton_kernels as kernels

    (T, D), F = x_TD.shape, chosen.coef_TF.shape[1]
    banks, slots = chosen.live_NS.shape
    w_gate, w_up, w_down = _rows_apart(*map(tensor_of, weights))
    s_gate, s_up, s_down = (w.scale_F.float().contiguous() if isinstance(w, Int8Rows) else None for w in weights)
    total, stride, early = banks * slots, w_up.stride(0), _early(x_TD)
    if T == 1 and ONE_KERNEL and D <= MOST_WIDTH:
        tiles, tuned = {"BD": _power_of_2(D)}, kernels.rows_one_kernel
        part_PTD = _empty(x_TD, max(c.kwargs["PROGRAMS"] for c in tuned.configs), T, D, dtype=torch.float32)
        tuned[lambda meta: (meta["PROGRAMS"],)](
            x_TD, w_gate, w_up, w_down, s_gate, s_up, s_down, chosen.coef_TF, chosen.live_NS, part_PTD,
            D, total, stride, ACT=act, **tiles, **early,
        )  # fmt: skip
        parts = tuned.best_config.kwargs["PROGRAMS"]
    else:
        h_TNS = _empty(x_TD, T, banks, slots, dtype=torch.float32)
        share = -(-total // (32 * PARTS)) * 32
        parts = -(-total // share)
        part_PTD = _empty(x_TD, parts, T, D, dtype=torch.float32)
        how = early
        if T == 1:
            inner, down = kernels.inner_one_kernel, kernels.down_one_kernel
        else:
            inner, down = kernels.inner_many_kernel, kernels.down_many_kernel
            how = early | {"BT": 16, "TYPE": _type_of_products(x_TD.dtype), "PRECISION": _precision()}

        def programs(meta: dict[str, int]) -> tuple[int, ...]:
            BR = meta["BR"]
            return (-(-total // BR),) if T == 1 else (banks, -(-slots // BR))

        inner[programs](x_TD, w_gate, w_up, s_gate, s_up, *chosen, h_TNS, D, F, T, banks, slots, stride, ACT=act, **how)
        down[lambda meta: (-(-D // meta["BD"]), parts)](
            h_TNS, w_down, s_down, *chosen[1:], part_PTD, D, F, T, total, slots, share, stride, **how
        )
    BD = 32 if parts <= 128 else 16
    kernels.sum_kernel[(-(-D // BD), T)](part_PTD, y_TD, D, T, parts, BP=_power_of_2(parts), BD=BD, **early)


def _rows_apart(*weights: Tensor) -> tuple[Tensor, ...]:
    """Each with rows that lie together, equally far apart in all: as given where that is so (`side_by_side_`), else
    copied."""
    if len({w.stride() for w in weights}) == 1 and weights[0].stride(1) == 1:
        return weights
    return tuple(w.contiguous() for w in weights)


def _early(x_TD: Tensor) -> dict[str, Any]:
    """What a launch is told of overlapping with the kernel before it."""
    from fallow.ops.bank_ffn.triton_tuning import overlapping

    early = EARLY and overlapping(x_TD)
    return {"EARLY": early, "launch_pdl": True} if early else {"EARLY": False}


def _type_of_products(dtype: torch.dtype) -> Any:
    """Triton's name of it; the interpreter's dot has no bf16."""
    import triton.language as tl

    return tl.float32 if interpreted() else getattr(tl, str(dtype).removeprefix("torch."))


def _precision() -> str:
    """fp32 products as torch.mm is set to do them."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _power_of_2(n: int) -> int:
    """The least one from n on."""
    return 1 << (n - 1).bit_length()


def _warps(bank: int) -> int:
    """Of a program that compares all channels of a bank with one another."""
    return max(1, min(8, bank * bank // 2048))


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Every buffer a kernel is to fill comes from here, so that tests can poison it."""
    return like.new_empty(shape, dtype=dtype)
