"""`with_room`: a call whose Python frames all lie in one piece of memory.

CPython keeps frames in chunks of 16 KB, mapped and unmapped as the stack grows and shrinks. Where the depth of a loop
happens to lie at the end of a chunk, every call maps one and gives it back: 180 times per token in a model of 30
layers, and each time the kernel interrupts the other cores, whose threads spin for their next kernel. Whether that
happens depends on how deep the caller is. Measured on SmolLM2, 2 cores: 11 ms per token without, 15 to 20 with it.
A frame too large for a chunk gets one of the next power of two: this one is a little over 128 KB, and what is called
below it has the other half of 256 KB. None of it is touched but by frames. Ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

_WORDS = 16_600
"""Of the large frame, 8 bytes each."""


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _roomy() -> Callable[..., Any]:
    if sys.implementation.name != "cpython" or sys.version_info < (3, 11):
        return _call
    return FunctionType(_call.__code__.replace(co_stacksize=_WORDS), _call.__globals__, "with_room")


with_room = _roomy()
"""`with_room(function, *arguments)` returns `function(*arguments)`."""
