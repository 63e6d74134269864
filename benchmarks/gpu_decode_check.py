"""Whether a compiled decoding step is right, for benchmarks/gpu_upcycle_decode.py.

With random predictors, logits of a sparse step cannot tell: rounding alone moves channels over the edge, and from layer
to layer that grows (as timed, 0.5 to 1.1 for 7B). So every channel is made to live for the check, where a form must be
as near to the stock step as rounding is. Of what is timed the distance is printed, beside that of the stock step from
itself with the embedding moved by the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from fallow.serving import Decoder

Notes = dict[str, str]
FAR, LEAST = 3.0, 0.05
"""A form is wrong when its logits, all channels alive, are so many times further from the stock step's than rounding
alone takes them, and at this relative distance or more. (Measured: 0.8 to 1.0 times.)"""


class Rounding(NamedTuple):
    """What the stock step answers, and how far off it is when the embedding moves by its last bit."""

    logits_V: Tensor
    distance: float


def rounding_of(decoder: Decoder, length: int) -> Rounding:
    """After the first `length` tokens of the text."""
    import torch

    def last_bit(_module: object, _given: object, x: Tensor) -> Tensor:
        """Of every second number, lest the norm undo it."""
        moved = torch.arange(x.shape[-1], device=x.device, dtype=torch.int16) % 2
        return (x.view(torch.int16) + moved).view(x.dtype)

    def once() -> Tensor:
        decoder.rewind(length)
        return decoder.step(1).clone()

    logits_V = once()
    hook = decoder.model.get_input_embeddings().register_forward_hook(last_bit)
    try:
        return Rounding(logits_V, distance(once(), logits_V))
    finally:
        hook.remove()


def distance(got_V: Tensor, want_V: Tensor) -> float:
    return float((got_V.float() - want_V.float()).norm() / want_V.float().norm())


@contextmanager
def all_alive(layers: Sequence[Any]) -> Iterator[None]:
    """Every channel lives meanwhile."""
    before = [layer.keep for layer in layers]
    for layer in layers:
        layer.keep = layer.bank
    try:
        yield
    finally:
        for layer, keep in zip(layers, before, strict=True):
            layer.keep = keep


def check(form: str, first: Callable[[], Tensor], whole: Rounding, notes: Notes) -> None:
    """Raises RuntimeError where the form is wrong. Where it is so only while launches overlap, they do not from here
    on, and a note says so."""
    from fallow.ops.bank_ffn import triton

    allowed = max(FAR * whole.distance, LEAST)
    found = distance(first(), whole.logits_V)
    if not found < allowed and triton.EARLY:
        triton.EARLY = False
        notes[form] = f"without overlapping launches, with which it is {found:.2f} from the stock step"
        print(f"  {form}: {notes[form]}")
        found = distance(first(), whole.logits_V)
    print(f"  {form}: {found:.4f} from the stock step, all channels alive; rounding alone {whole.distance:.4f}")
    if not found < allowed:
        raise RuntimeError(f"all channels alive, its logits are {found:.2f} from the stock step's")


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:1])[:200]}"
