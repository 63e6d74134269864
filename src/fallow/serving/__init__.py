"""Serving: a decoding loop with little overhead, so that what a sparse model saves is seen end to end."""

from fallow.serving.decoder import Decoder, Generated, stop_tokens_of
from fallow.serving.sampling import Sampling, pick

__all__ = ["Decoder", "Generated", "Sampling", "pick", "stop_tokens_of"]
