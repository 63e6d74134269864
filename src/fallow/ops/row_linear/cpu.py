"""`row_linear` in compiled C++ (native/row_linear.cpp): the weights stream past once, in the order of memory."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fallow.ops import native

name = "cpu"
MOST_ROWS = 8
"""Rows of x up to which it serves; with more, blocked products win."""
_DTYPES = (torch.bfloat16, torch.float32)
_TABLES = [c_int64 * (6 * n) for n in range(17)]


@cache
def _function() -> tuple[Any, str]:
    ok, reason = native.available()
    if not ok:
        return None, reason
    try:
        function = native.library().fallow_linears_of_rows
    except AttributeError:
        return None, "the compiled library is older than this package; reinstall fallow"
    function.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int, c_int]
    function.restype = None
    return function, reason


def available() -> tuple[bool, str]:
    function, reason = _function()
    return function is not None, reason


def serves(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """`available()` and `usable()` in 2 µs: what is asked at every call."""
    dtype = x.dtype
    if not x.is_cpu or x.numel() > MOST_ROWS * x.shape[-1] or len(weights) >= len(_TABLES) or dtype not in _DTYPES:
        return False
    for w in weights:
        if w.dtype != dtype or not w.is_cpu or 1 not in w.stride():
            return False
    for b in biases:
        if b is not None and (b.dtype != dtype or not b.is_contiguous()):
            return False
    return _function()[0] is not None


def usable(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[bool, str]:
    """Also asked of fake tensors, while a graph is rewritten."""
    dtype, width = x.dtype, x.shape[-1]
    if x.device.type != "cpu":
        return False, f"x is on {x.device}"
    if dtype not in _DTYPES:
        return False, f"{dtype} is neither bf16 nor fp32"
    if x.numel() > MOST_ROWS * width:
        return False, f"more than {MOST_ROWS} rows"
    if len(weights) >= len(_TABLES):
        return False, f"more than {len(_TABLES) - 1} linears at once"
    for w in weights:
        if w.dtype != dtype or w.device.type != "cpu" or 1 not in w.stride():
            return (
                False,
                "a weight of which neither rows nor columns lie together, or of another dtype or device than x",
            )
    if any(b is not None and (b.dtype != dtype or not b.is_contiguous()) for b in biases):
        return False, "a bias of another dtype than x"
    return True, f"{torch.get_num_threads()} threads"


def row_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Arguments as `fallow.ops.row_linear.row_linear`."""
    x = x.contiguous()
    *leading, width = x.shape
    rows = x.numel() // width
    sizes = [w.shape[0] for w in weights]
    outputs = sum(sizes)
    # [one linear after the other][rows][its outputs]: with one row or one linear this already is the result.
    y = x.new_empty((*leading, outputs))
    at, step = y.data_ptr(), rows * x.element_size()
    table: list[int] = []
    for w, b, size in zip(weights, biases, sizes, strict=True):
        between, along = w.stride()
        by_inputs = along != 1
        stride = along if by_inputs else between
        table += (w.data_ptr(), 0 if b is None else b.data_ptr(), at, size, stride, by_inputs)
        at += size * step
    n = len(sizes)
    bf16 = x.dtype is torch.bfloat16
    _function()[0](_TABLES[n](*table), n, x.data_ptr(), rows, width, bf16, torch.get_num_threads())
    if rows > 1 and n > 1:
        parts = y.view(-1).split([rows * size for size in sizes])
        y = torch.cat([part.view(rows, -1) for part in parts], dim=1).view(*leading, outputs)
    return y
