"""`bank_ffn` on CPUs for a few tokens, 8 at a time: native/bank.cpp, one parallel region from the predictor to y.

It is bound by memory, so what counts is that only living rows are read, that enough of them come side by side, and that
the threads are PyTorch's own, which are awake while a model decodes. AVX-512 (with VNNI where there is), AVX2 or plain
C++, chosen at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.ops import native
from fallow.ops.activation import ACTIVATIONS
from fallow.ops.bank_ffn.select import KINDS, Int8Rows, Predictor, Weight, tensor_of

name = "cpu"

AT_ONCE, MOST_BANK = 8, 1024
MOST_TOKENS = {torch.bfloat16: 16, torch.float32: 16, torch.int8: 256}
"""By dtype of the weights, for how many tokens reading rows again for every 8 is faster than dense GEMMs with a mask,
which need copies of int8 rows."""
_ANY = -1
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_INT8 = _TYPES[torch.int8]
_NONE = (None, None, None)
_KINDS = {kind: i for i, kind in enumerate(("linear", "bilinear", "quantized", "scores"))}
_ACTS = {act: i for i, act in enumerate(ACTIVATIONS)}
assert tuple(_KINDS) == KINDS


@torch.compiler.assume_constant_result  # the compiler cannot look into loading a library
def available() -> tuple[bool, str]:
    """Whether the compiled kernels are there, and why not."""
    return native.available()


def usable(x_TD: Tensor, predictor: Predictor, w_up_FD: Weight, bank: int) -> tuple[bool, str]:
    """Whether these arguments can be served here, and why not."""
    if x_TD.device.type != "cpu":
        return False, f"x is on {x_TD.device}"
    if x_TD.dtype not in (torch.bfloat16, torch.float32):
        return False, f"{x_TD.dtype}; served are bfloat16 and float32"
    if (most := MOST_TOKENS.get(tensor_of(w_up_FD).dtype, 0)) < x_TD.shape[0]:
        return False, f"{x_TD.shape[0]} tokens; up to {most} are served"
    if bank > MOST_BANK:
        return False, f"banks of {bank}; up to {MOST_BANK} are served"
    if predictor.kind in ("linear", "bilinear") and predictor.tensors[0].dtype not in _TYPES:
        return False, f"factors in {predictor.tensors[0].dtype}; served are float32, bfloat16 and int8"
    return True, "reads living rows only"


def mask_usable(scores_TF: Tensor, bank: int) -> tuple[bool, str]:
    """Whether `bank_mask` can be served here, and why not."""
    if scores_TF.device.type != "cpu":
        return False, f"scores are on {scores_TF.device}"
    if scores_TF.dtype not in (torch.bfloat16, torch.float32):
        return False, f"{scores_TF.dtype}; served are bfloat16 and float32"
    if bank > MOST_BANK:
        return False, f"banks of {bank}; up to {MOST_BANK} are served"
    return True, "counts in vectors"


def rounded(w_FD: Tensor, *, bits: int, group: int) -> Tensor:
    """As `fallow.ops.bank_ffn.rounded`, of a bf16 or fp32 matrix on the CPU."""
    w_FD = w_FD.contiguous()
    out_FD = torch.empty_like(w_FD)
    native.library().fallow_round_groups(
        w_FD.data_ptr(),
        out_FD.data_ptr(),
        w_FD.dtype == torch.bfloat16,
        *w_FD.shape,
        group,
        bits,
        torch.get_num_threads(),
    )
    return out_FD


def bank_mask(scores_TF: Tensor, *, bank: int, keep: int, level: int = _ANY) -> Tensor:
    """As `fallow.ops.bank_ffn.bank_mask`. `level` 0 to 3 asks for plain C++, AVX2, AVX-512 or AVX-512 with VNNI, as far
    as this CPU has it."""
    scores_TF = scores_TF.contiguous()
    T, F = scores_TF.shape
    out_TF = torch.empty(T, F, dtype=torch.bool)
    threads = torch.get_num_threads() if T * F >= _MASK_ALONE else 1
    native.library().fallow_bank_mask(
        scores_TF.data_ptr(),
        out_TF.data_ptr(),
        T,
        F // bank,
        bank,
        keep,
        scores_TF.dtype == torch.bfloat16,
        threads,
        level,
    )
    return out_TF


_MASK_ALONE = 1 << 14
"""Scores up to which one thread is as fast as several."""


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
    level: int = _ANY,
) -> Tensor:
    """Arguments as `fallow.ops.bank_ffn.bank_ffn`, x as [T, D]; `level` as in `bank_mask`."""
    y_TD, weights = torch.empty(x_TD.shape, dtype=x_TD.dtype), (w_gate_FD, w_up_FD, w_down_FD)
    if x_TD.shape[0] <= AT_ONCE:
        _call(x_TD, predictor, weights, act, bank, keep, level, y_TD, None)
        return y_TD
    for begin in range(0, x_TD.shape[0], AT_ONCE):
        some = slice(begin, begin + AT_ONCE)
        _call(x_TD[some], _of(predictor, some), weights, act, bank, keep, level, y_TD[some], None)
    return y_TD


def scores(x_TD: Tensor, predictor: Predictor, w_up_FD: Weight, *, act: str, level: int = _ANY) -> Tensor:
    """fp32 [T, F] of any number of tokens: the very scores that `bank_ffn` compares. `w_up_FD` is not read."""
    found_TF = torch.empty(x_TD.shape[0], tensor_of(w_up_FD).shape[0])
    for begin in range(0, x_TD.shape[0], _SCORED_AT_ONCE):
        some = slice(begin, begin + _SCORED_AT_ONCE)
        weights = (w_up_FD, w_up_FD, w_up_FD)
        _call(x_TD[some], _of(predictor, some), weights, act, _UNIT, 1, level, None, found_TF[some])
    return found_TF


def _of(p: Predictor, tokens: slice) -> Predictor:
    """The predictor of some of the tokens."""
    return p._replace(tensors=(p.tensors[0][tokens],)) if p.kind == "scores" else p


_UNIT = 64
"""Channels whose scores a thread computes at once, where there are no banks."""
_SCORED_AT_ONCE = 64
"""For which scores are computed from one reading of the predictor."""


def _call(
    x_TD: Tensor,
    predictor: Predictor,
    weights: tuple[Weight, Weight, Weight],
    act: str,
    bank: int,
    keep: int,
    level: int,
    y_TD: Tensor | None,
    scores_TF: Tensor | None,
) -> None:
    """Fills y, or scores where y is None."""
    T, D = x_TD.shape
    if T == 0:
        return
    x_TD = x_TD.contiguous()
    kind, tensors, tilt_F, gate, compensation = predictor
    row_scales = _NONE
    if isinstance(weights[1], Int8Rows):
        row_scales = [w.scale_F.data_ptr() for w in weights]  # type: ignore[union-attr]
    # copies, here and below, must outlive the call
    codes = [t if t.stride(1) == 1 else t.contiguous() for t in map(tensor_of, weights)]
    held = [t if t.is_contiguous() else t.contiguous() for t in tensors]
    tilt = None if tilt_F is None else tilt_F.float().contiguous()
    stand_in: list[Tensor] = []
    if compensation is not None and y_TD is not None:
        dtypes = (x_TD.dtype, x_TD.dtype, torch.float32)
        stand_in = [t.to(dtype).contiguous() for t, dtype in zip(compensation, dtypes, strict=True)]
    rank = groups = group = bits = factor_type = 0
    scales: list[int] = []
    if kind == "quantized":
        _, groups, _, bits, group = held[0].shape
        group //= 2
    elif kind == "scores":
        held[0] = held[0].float()
    else:
        rank, factor_type = held[0].shape[0], _TYPES[held[0].dtype]
    addresses = [t.data_ptr() for t in held]
    if factor_type == _INT8:
        addresses, scales = addresses[::2], addresses[1::2]
    call = native.BankCall(
        x_TD.data_ptr(),
        None if y_TD is None else y_TD.data_ptr(),
        T,
        D,
        codes[1].shape[0],
        bank,
        keep,
        *[t.data_ptr() for t in codes],
        *[t.stride(0) for t in codes],
        *row_scales,
        native.FourAddresses(*addresses),
        native.FourAddresses(*scales),
        rank,
        groups,
        group,
        None if tilt is None else tilt.data_ptr(),
        *([t.data_ptr() for t in stand_in] or _NONE),
        stand_in[0].shape[0] if stand_in else 0,
        None if scores_TF is None else scores_TF.data_ptr(),
        x_TD.dtype == torch.bfloat16,
        _TYPES[codes[1].dtype],
        _ACTS[act],
        _KINDS[kind],
        factor_type,
        bits,
        gate == "smooth",
        torch.get_num_threads(),
        level,
    )
    native.library().fallow_bank_ffn(call)
