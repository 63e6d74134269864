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
_TABLES = [c_int64 * (5 * n) for n in range(17)]


@cache
def _function() -> tuple[Any, str]:
    ok, reason = native.available()
    if not ok:
        return None, reason
    try:
        function = native.library().fallow_row_linears
    except AttributeError:
        return None, "the compiled library is older than this package; reinstall fallow"
    function.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int, c_int]
    function.restype = None
    return function, reason


def available() -> tuple[bool, str]:
    function, reason = _function()
    return function is not None, reason


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
        if w.dtype != dtype or w.device.type != "cpu" or not (w.is_contiguous() or w.t().is_contiguous()):
            return False, "a weight whose rows or columns do not lie together, or of another dtype or device than x"
    if any(b is not None and (b.dtype != dtype or not b.is_contiguous()) for b in biases):
        return False, "a bias of another dtype than x"
    return True, f"{torch.get_num_threads()} threads"


def row_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Arguments as `fallow.ops.row_linear.row_linear`."""
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    sizes = [w.shape[0] for w in weights]
    # [outputs of one linear][rows][its size]: with one row or one linear this already is the result.
    y = x.new_empty(rows * sum(sizes))
    table = _TABLES[len(sizes)]()
    at, step = y.data_ptr(), rows * x.element_size()
    for i, (w, b, size) in enumerate(zip(weights, biases, sizes, strict=True)):
        by_inputs = not w.is_contiguous()
        table[5 * i : 5 * i + 5] = (w.data_ptr(), 0 if b is None else b.data_ptr(), at, size, by_inputs)
        at += size * step
    bf16 = x.dtype == torch.bfloat16
    _function()[0](table, len(sizes), x.data_ptr(), rows, width, bf16, torch.get_num_threads())
    if rows > 1 and len(sizes) > 1:
        y = torch.cat([part.view(rows, -1) for part in y.split([rows * s for s in sizes])], dim=1)
    return y.view(*x.shape[:-1], sum(sizes))
