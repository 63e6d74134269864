"""A hash of the FFN weights that predictors were made for, so that they are not put on another model.

Of bf16-rounded weights, so that a model saved in bf16 and loaded in fp32 is the same one; of at most 4096 entries per
matrix, evenly spaced, because hashing 7B weights takes longer than loading them. Of sharded weights (FSDP2) there is
none: one rank writes a state, and gathering the weights needs them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch.distributed.tensor import DTensor

from fallow.methods.upcycle.layers import GatedFFN

ENTRIES = 4096


def fingerprint(layers: Sequence[GatedFFN], changed: Mapping[str, torch.Tensor] = MappingProxyType({})) -> str:
    """Hex digest, empty where weights are sharded. `changed`: weights that are to be other ones, by name."""
    digest = hashlib.sha256()
    for layer in layers:
        for where in layer.view.parameters_along_channels():
            weight = changed.get(where.name, where.parameter).detach()
            if isinstance(weight, DTensor):
                return ""
            flat = weight.reshape(-1) if weight.is_contiguous() else weight.flatten()
            step = max(1, flat.numel() // ENTRIES)
            sample = flat[::step].to(device="cpu", dtype=torch.bfloat16).contiguous().view(torch.int16)
            digest.update(str(tuple(weight.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()
