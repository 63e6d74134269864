"""`--to gguf_f32`: as gguf, with all weights in f32: twice the bytes, for comparing engines rather than for use."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from fallow.exporting import Written, gguf


def write(model: PreTrainedModel, folder: Path) -> Written:
    """Fill `folder` and verify it; see `gguf.write`."""
    return gguf.write(model, folder, dtype=torch.float32)
