"""A folder that stock transformers loads: safetensors, config and generation config, dead weights as zeros.

Verified by loading it the stock way: every tensor must equal the model's, and the logits of a few tokens must agree
within rounding, which also notices a config that was written wrongly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fallow.errors import CheckpointError
from fallow.exporting import Written
from fallow.exporting.stock import StockTensors, as_evaluated, compare, refuse_odd_keys

# Share of the largest logit. The same weights go through the same layers; only the order of a sum may differ.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUNDING_16 = 5e-2


def write(model: PreTrainedModel, folder: Path) -> Written:
    """Fill `folder` and verify it.

    Raises:
        ConfigError, UnsupportedModelError: see `StockTensors`.
        CheckpointError: what was written does not load as the same model.
    """
    tensors = StockTensors(model)
    save(model, folder, {name: tensors[name] for name in tensors.names})
    return Written(dense_bytes=tensors.nbytes(), packed_layers=0, verified=_verify(model, tensors, folder))


def save(model: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> None:
    """`save_pretrained`, which knows how each family ties and shards its weights, given a stock state."""
    told = model.config.dtype, model.config.architectures  # it sets both in the caller's config
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype, model.config.architectures = told


def _verify(model: PreTrainedModel, tensors: StockTensors, folder: Path) -> list[str]:
    with as_evaluated(model):
        answer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        loaded, notes = answer
        refuse_odd_keys(notes)
        same = compare(tensors, loaded, "export")
        take_buffers(model, loaded)
        vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        ids_BT = (torch.arange(16, device=model.device) * 7 % vocab).view(2, 8)
        ones_BT = torch.ones_like(ids_BT)
        wanted_BTV = model(input_ids=ids_BT, attention_mask=ones_BT, use_cache=False).logits.float()
        found_BTV = loaded.to(model.device)(input_ids=ids_BT, attention_mask=ones_BT, use_cache=False).logits.float()
    difference = float((wanted_BTV - found_BTV).abs().max() / wanted_BTV.abs().max().clamp_min(1e-30))
    allowed = _ROUNDING.get(model.dtype, _ROUNDING_16)
    if not difference <= allowed:
        raise CheckpointError(
            f"export: logits of the folder loaded by stock transformers differ from the model's by {difference:.1e} of"
            f" the largest, more than the rounding of {allowed:g}; nothing was written"
        )
    return [same, f"logits of {ids_BT.numel()} tokens by stock transformers within {difference:.1e} of the model's"]


def take_buffers(model: PreTrainedModel, loaded: PreTrainedModel) -> None:
    """Give `loaded` the model's unsaved buffers (rotary frequencies), after a check that they agree.

    `model.to(bfloat16)` rounds them, stock loading does not: in a 6-layer bf16 model that alone moves logits by 2 % of
    the largest, so a bound that lets it pass would let much else pass.
    """
    saved, found = loaded.state_dict().keys(), dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        other = found.get(name)
        if other is None or name in saved or other.shape != buffer.shape:
            continue
        if not torch.allclose(buffer.float().cpu(), other.float(), rtol=2**-7, atol=1e-6):
            raise CheckpointError(
                f"export: {name} of the folder loaded by stock transformers differs from the model's, so its config"
                " does; nothing was written"
            )
        other.data = buffer.detach().clone()
