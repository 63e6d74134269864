"""At some depth of the stack every call maps a chunk of frames and gives it back; below `with_room` at none."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest

from fallow.serving.frames import with_room

DEPTHS, CALLS = 250, 300


def leaf(a: int, b: int = 0, c: int = 0, d: int = 0) -> int:
    return a + b + c + d


def faults_at(depth: int) -> int:
    """Page faults of `CALLS` calls made that deep in the stack."""
    if depth:
        return faults_at(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(CALLS):
        leaf(i)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def most_faults(call: Callable[..., int]) -> int:
    return max(call(faults_at, depth) for depth in range(DEPTHS))


@pytest.mark.skipif(sys.implementation.name != "cpython" or not sys.platform.startswith("linux"), reason="CPython's")
def test_frames_below_it_stay_in_one_chunk() -> None:
    assert most_faults(lambda function, depth: function(depth)) >= CALLS, "the trouble is gone: delete frames.py"
    assert most_faults(with_room) < CALLS / 10


def test_it_hands_over_arguments_results_and_errors() -> None:
    assert with_room(leaf, 1, 2, 3, 4) == 10
    with pytest.raises(TypeError):
        with_room(leaf)
