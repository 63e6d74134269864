"""What a token reads of an FFN, as shares of the dense FFN's bytes: living rows, predictor, compensation. Decoding is
bound by them."""

from __future__ import annotations

from typing import NamedTuple

from fallow.methods.upcycle.config import Upcycle

FACTOR_BYTES, SCALE_BYTES = 1, 4
"""bf16 models serve predictors' factors as int8 rows, an fp32 scale each."""


class BytesRead(NamedTuple):
    """Shares of the bytes of a dense FFN's three matrices; `total` of 0.28 makes 3.6 the ideal speed-up."""

    living: float
    predictor: float
    compensation: float = 0.0

    @property
    def total(self) -> float:
        return self.living + self.predictor + self.compensation


def bytes_read(
    config: Upcycle, *, width: int, channels: int, keep: float, rank: int = 0, weight_bytes: float = 2
) -> BytesRead:
    """Of one FFN per token.

    Args:
        width, channels: D and F.
        keep: living channels per bank.
        rank: inner width of a linear or bilinear predictor.
        weight_bytes: of a weight: 2 in bf16, 1 in int8.
    """
    dense = 3 * width * channels * weight_bytes
    if config.predictor == "quantized":
        scale = 2 / config.group
        read = 2 * width * channels * (config.bits / 8 + scale)
    else:
        pairs = 1 if config.predictor == "linear" else 2
        read = pairs * ((width + channels) * rank * FACTOR_BYTES + (rank + channels) * SCALE_BYTES)
    stand_in = width * (2 * config.compensation + 1) * max(2, weight_bytes) if config.compensation else 0
    return BytesRead(keep / config.bank, read / dense if config.selection == "predictor" else 0.0, stand_in / dense)
