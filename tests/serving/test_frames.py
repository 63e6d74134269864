"""At some depth of the stack every call maps a chunk of frames and gives it back; below `with_room` at none."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest

from fallow.serving import Decoder
from fallow.serving.frames import with_room
from tiny_models import tiny_model

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


chunked = pytest.mark.skipif(
    sys.implementation.name != "cpython" or not sys.platform.startswith("linux"), reason="counts CPython's chunks"
)


@chunked
def test_frames_below_it_stay_in_one_chunk() -> None:
    assert most_faults(lambda function, depth: function(depth)) >= CALLS, "the trouble is gone: delete frames.py"
    assert most_faults(with_room) < CALLS / 10


@chunked
def test_the_decoder_calls_its_model_with_room() -> None:
    model, seen = tiny_model("llama").eval(), []
    decoder = Decoder(model, max_tokens=8, compiled=False)
    decoder.prefill([1, 2, 3])
    model.register_forward_pre_hook(lambda *_: seen.append(most_faults(lambda function, depth: function(depth))))
    decoder.step(4)
    assert len(seen) == 1 and seen[0] < CALLS / 10


def test_it_hands_over_arguments_results_and_errors() -> None:
    assert with_room(leaf, 1, 2, 3, 4) == 10
    with pytest.raises(TypeError):
        with_room(leaf)
