"""Loads `fallow/_native*.so`, the compiled CPU kernels, through ctypes: a plain C library with no Python or PyTorch
symbols in it.

The obvious alternative, a torch extension, must be rebuilt for every PyTorch release and needs its headers at install.
A call costs about 5 us. Nothing is loaded at import; without the library every op has a pure PyTorch path.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

from fallow.errors import BackendError

_ISA = ("portable C++", "AVX2", "AVX-512", "AVX-512 and AMX (bf16)")


class AdamWHyper(ctypes.Structure):
    """`fallow::AdamWHyper`: what all tensors of a parameter group share."""

    _fields_ = (
        ("lr", c_double),
        ("beta1", c_double),
        ("beta2", c_double),
        ("eps", c_double),
        ("weight_decay", c_double),
        ("grad_scale", c_double),
    )


class AdamWTensor(ctypes.Structure):
    """`fallow::AdamWTensor`: one parameter, its state and gradient by address."""

    _fields_ = (
        ("param", c_void_p),
        ("master", c_void_p),
        ("exp_avg", c_void_p),
        ("exp_avg_sq", c_void_p),
        ("grad", c_void_p),
        ("numel", c_int64),
        ("step_size", c_double),
        ("bias2_sqrt", c_double),
        ("param_bf16", c_int32),
        ("grad_bf16", c_int32),
    )


FourAddresses = c_void_p * 4


class BankCall(ctypes.Structure):
    """`fallow::bank::Call`: one call of `bank_ffn`; None where an address does not apply."""

    _fields_ = (
        *((n, c_void_p) for n in ("x", "y")),
        *((n, c_int64) for n in ("tokens", "width", "channels", "bank", "keep")),
        *((n, c_void_p) for n in ("gate", "up", "down")),
        *((n, c_int64) for n in ("gate_stride", "up_stride", "down_stride")),
        *((n, c_void_p) for n in ("gate_scale", "up_scale", "down_scale")),
        ("factors", FourAddresses),
        ("factor_scales", FourAddresses),
        *((n, c_int64) for n in ("rank", "groups", "group")),
        *((n, c_void_p) for n in ("tilt", "stand_v", "stand_u", "stand_bias")),
        ("stand_rank", c_int64),
        ("scores", c_void_p),
        *((n, c_int32) for n in ("x_bf16", "type", "act", "kind", "factor_type", "bits", "smooth", "n_threads")),
        ("level", c_int32),
    )


_HYPER, _TENSOR, _ADDRESS = POINTER(AdamWHyper), POINTER(AdamWTensor), c_void_p
_CE_COMMON = (_ADDRESS, c_int, c_int64, c_int64, c_int64, _ADDRESS, c_int64, _ADDRESS)
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "fallow_adamw_dense": (_TENSOR, c_int64, _HYPER, c_int),
    "fallow_adamw_rows": (_TENSOR, c_int64, _ADDRESS, c_int64, _ADDRESS, _HYPER, c_int),
    "fallow_adamw_cols": (_TENSOR, c_int64, c_int64, _ADDRESS, c_int64, _ADDRESS, _HYPER, c_int),
    "fallow_adamw_aged": (_TENSOR, *[_ADDRESS] * 3, c_int64, c_uint32, c_int, _HYPER, c_int),
    "fallow_expand": (*[_ADDRESS] * 4, c_int64, c_int64, c_int, c_int, c_int),
    "fallow_compress": (*[_ADDRESS] * 4, c_int64, c_int64, c_int, c_int, c_int),
    "fallow_block_forward": (*[_ADDRESS] * 5, c_int64, c_int, c_int, c_int),
    "fallow_block_backward": (*[_ADDRESS] * 6, c_int64, c_int, c_int, c_int),
    "fallow_expert_sort": (_ADDRESS, *[c_int64] * 4, *[_ADDRESS] * 4),
    "fallow_expert_gather": (*[_ADDRESS] * 3, *[c_int64] * 3, c_int),
    "fallow_expert_hidden": (*[_ADDRESS] * 3, c_int64, *[c_int] * 3),
    "fallow_expert_hidden_backward": (*[_ADDRESS] * 6, c_int64, c_int64, *[c_int] * 3),
    "fallow_expert_combine": (*[_ADDRESS] * 4, *[c_int64] * 3, c_int, c_int),
    "fallow_bank_ffn": (POINTER(BankCall),),
    "fallow_bank_mask": (_ADDRESS, _ADDRESS, *[c_int64] * 4, *[c_int] * 3),
    "fallow_round_groups": (_ADDRESS, _ADDRESS, c_int, *[c_int64] * 3, c_int, c_int),
    "fallow_divergence": (_ADDRESS, _ADDRESS, c_int, c_int64, c_int64, _ADDRESS, _ADDRESS, c_int),
    "fallow_cross_entropy_forward": (*_CE_COMMON, _ADDRESS, c_int),
    "fallow_cross_entropy_backward": (*_CE_COMMON, c_float, _ADDRESS, c_int),
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    found = sorted(Path(__file__).resolve().parent.parent.glob("_native*.so"))
    if not found:
        return None, "fallow/_native*.so was not built (install a C++17 compiler and reinstall fallow)"
    try:
        library = ctypes.CDLL(str(found[0]))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = list(arguments), None
        isa = _ISA[library.fallow_isa()]
    except (OSError, AttributeError) as error:
        return None, f"{found[0].name} does not load: {error}; reinstall fallow"
    return library, f"{found[0].name}, {isa}"


def available() -> tuple[bool, str]:
    """Whether the compiled kernels can be called, and their file and instruction set, or why not."""
    library, reason = _load()
    return library is not None, reason


def has_amx() -> bool:
    """Whether bf16 products run on AMX tiles here: in these kernels, and then in oneDNN's too."""
    loaded, _ = _load()
    return loaded is not None and _ISA[loaded.fallow_isa()].endswith("AMX (bf16)")


def library() -> ctypes.CDLL:
    """The loaded library. Raises BackendError when `available()` is false."""
    loaded, reason = _load()
    if loaded is None:
        raise BackendError(f"native CPU kernels: {reason}")
    return loaded
