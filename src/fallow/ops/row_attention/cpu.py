"""`row_attention` in compiled C++ (native/row_attention.cpp): open places only, each read once for a group's heads."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fallow.ops import native

name = "cpu"
_DTYPES = (torch.bfloat16, torch.float32)
_LINE_BYTES = 64
_SIZES = c_int64 * 12


@cache
def _function() -> tuple[Any, str]:
    ok, reason = native.available()
    if not ok:
        return None, reason
    try:
        function = native.library().fallow_row_attention
    except AttributeError:
        return None, "the compiled library is older than this package; reinstall fallow"
    function.argtypes = [*[c_void_p] * 6, c_float, c_int, c_int]
    function.restype = None
    return function, reason


def available() -> tuple[bool, str]:
    function, reason = _function()
    return function is not None, reason


def usable(q_BHd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, mask_BL: Tensor | None) -> tuple[bool, str]:
    """Also asked of fake tensors, while a graph is rewritten."""
    if any(t.device.type != "cpu" for t in (q_BHd, k_BGLd, v_BGLd)):
        return False, f"q is on {q_BHd.device}"
    if q_BHd.dtype not in _DTYPES or not q_BHd.dtype == k_BGLd.dtype == v_BGLd.dtype:
        return False, f"{q_BHd.dtype}, {k_BGLd.dtype} and {v_BGLd.dtype} are not all bf16 or all fp32"
    if k_BGLd.shape[3] != v_BGLd.shape[3] or q_BHd.shape[2] * q_BHd.element_size() % _LINE_BYTES:
        return False, f"heads of {q_BHd.shape[2]} are no whole number of {_LINE_BYTES} bytes, or other ones for values"
    if k_BGLd.stride(3) != 1 or v_BGLd.stride(3) != 1:
        return False, "a head's entries do not lie together"
    if mask_BL is not None and mask_BL.dtype != torch.bool:
        return False, f"the mask is {mask_BL.dtype}, not bool"
    return True, f"{torch.get_num_threads()} threads"


def serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """`usable` in a microsecond: what is asked at every call."""
    return (
        q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and q.dtype in _DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[2] * q.element_size() % _LINE_BYTES == 0
        and k.shape[3] == v.shape[3]
        and k.stride(3) == 1 == v.stride(3)
        and (mask is None or mask.dtype is torch.bool)
    )


def row_attention(q_BHd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, mask_BL: Tensor | None, scale: float) -> Tensor:
    """Arguments as `fallow.ops.row_attention.row_attention`."""
    q_BHd = q_BHd.contiguous()
    B, H, d = q_BHd.shape
    G, L = k_BGLd.shape[1:3]
    mask_stride = 0
    if mask_BL is not None:
        mask_BL = mask_BL.contiguous()
        mask_stride = L if mask_BL.shape[0] > 1 else 0
    out = torch.empty_like(q_BHd)
    sizes = _SIZES(B, H, G, L, d, mask_stride, *k_BGLd.stride()[:3], *v_BGLd.stride()[:3])
    _function()[0](
        q_BHd.data_ptr(),
        k_BGLd.data_ptr(),
        v_BGLd.data_ptr(),
        None if mask_BL is None else mask_BL.data_ptr(),
        out.data_ptr(),
        sizes,
        scale,
        q_BHd.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out
