"""How many channels each layer keeps, at the same total: more where the loss is sensitive, fewer where it is not.

Sensitivity is measured, one layer sparse at a time, at a few sizes; what lies between is interpolated. The sum of the
layers' gaps stands for the gap of the whole, which is less than exact (errors add up along the depth) and orders
layers well. Spent greedily: always where the next step lowers the sum most per channel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from fallow.errors import ConfigError

if TYPE_CHECKING:
    from fallow.method import Mode
    from fallow.methods.upcycle.method import UpcycleMethod


def sensitivity(handle: UpcycleMethod, keeps: Sequence[int]) -> dict[int, list[float]]:
    """Loss on the watched batch with one layer sparse, less the dense loss: a list by layer for every size.

    Raises:
        ConfigError: no batch is watched.
    """
    if handle.watched.batch is None:
        raise ConfigError("sensitivity needs a batch to measure on; call watch(batch) first")
    handle.start()
    before = [(layer.mode, layer.keep) for layer in handle.layers]
    found: dict[int, list[float]] = {}
    try:
        for layer in handle.layers:
            layer.mode = "dense"
        dense = handle.watched.pass_over(sparse=True)
        for keep in keeps:
            found[keep] = []
            for layer in handle.layers:
                layer.mode, layer.keep = "sparse", keep
                found[keep].append(handle.watched.pass_over(sparse=True) - dense)
                layer.mode = "dense"
    finally:
        for layer, (mode, keep) in zip(handle.layers, before, strict=True):
            layer.mode, layer.keep = cast("Mode", mode), keep
    return found


def allocate(gaps: Mapping[int, Sequence[float]], *, bank: int, average: int, step: int = 4) -> tuple[int, ...]:
    """Channels kept per bank, layer by layer, `average` in the mean.

    Args:
        gaps: by size, each layer's rise of the loss when it alone keeps so many (`sensitivity`); at `bank` it is 0.
        bank: channels of a bank.
        average: what the layers keep in the mean.
        step: granularity; every layer keeps at least `step`.

    Raises:
        ConfigError: `average` is no multiple of `step`, or below it.
    """
    if average % step or average < step:
        raise ConfigError(f"allocate: average={average} must be a multiple of step={step}")
    sizes = sorted({*gaps, bank})
    n_layers = len(gaps[min(gaps)])

    def gap(layer: int, keep: int) -> float:
        """Interpolated between sizes; below the smallest, on along its slope; never rising with `keep`."""
        at = max(1, bisect_left(sizes, keep))
        low, high = sizes[at - 1], sizes[min(at, len(sizes) - 1)]
        values = [0.0 if k == bank else max(0.0, gaps[k][layer]) for k in (low, high)]
        return values[1] + (values[0] - values[1]) * (high - keep) / max(1, high - low)

    kept = [step] * n_layers
    for _ in range((average - step) // step * n_layers):
        gains = [gap(n, k) - gap(n, k + step) if k + step <= bank else float("-inf") for n, k in enumerate(kept)]
        best = max(range(n_layers), key=lambda n: (round(gains[n], 9), -kept[n]))  # of equal gains the smallest layer
        kept[best] += step
    return tuple(kept)
