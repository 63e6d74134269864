"""Loading what `--to fallow` wrote: the stock model, sparsified by Upcycle, with the predictors of the folder.

`AutoModelForCausalLM.from_pretrained` ends here (`upcycle_config.py`), so everything it takes (a hub name, `dtype`,
`device_map`, `attn_implementation`) is the stock class's to interpret. FFN weights in int8 are loaded by the same code
into a skeleton that has `Int8Linear` in the right places; to load them dense and round them again would need twice the
memory of the whole.

predictors.safetensors: the tensors of `UpcycleMethod.state_dict()`, without the batch that training watched; its plain
scalars as JSON in the metadata, under "scalars".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from fallow import anatomy
from fallow.anatomy.int8 import Int8Linear
from fallow.errors import CheckpointError
from fallow.exporting.upcycle_config import UpcycleConfig
from fallow.handle import sparsify
from fallow.methods.upcycle import Upcycle, UpcycleMethod

PREDICTORS = "predictors.safetensors"
_WHERE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def settings_of(handle: UpcycleMethod) -> dict[str, Any]:
    """What of the handle's config a served model depends on, as JSON holds it. What only training reads is left out: a
    `distill` would have every loader keep a copy of the weights."""
    config = handle.config
    keep = [layer.keep for layer in handle.layers]
    served = ("bank", "predictor", "rank", "bits", "group", "gate", "criterion", "compensation", "prompts")
    return {name: getattr(config, name) for name in served} | {"keep": keep if len(set(keep)) > 1 else keep[0]}


def write_predictors(state: dict[str, Any], file: Path) -> None:
    """Write a state of `UpcycleMethod`."""
    state = {k: v for k, v in state.items() if not k.startswith("probe.")}
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
    scalars = {k: v for k, v in state.items() if k not in tensors}
    save_file(tensors, file, metadata={"format": "pt", "scalars": json.dumps(scalars)})


def read_predictors(file: Path) -> dict[str, Any]:
    """What `write_predictors` was given. Raises CheckpointError where the file is damaged."""
    try:
        with safe_open(file, framework="pt") as source:
            state: dict[str, Any] = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
            return state | json.loads(source.metadata()["scalars"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} is damaged ({' '.join(str(error).split())[:120]}); export the model again"
        ) from None


def load(name: Any, *args: Any, config: UpcycleConfig, **kwargs: Any) -> Any:
    """The model of such a folder, in evaluation mode, sparse; its handle is `model._fallow`.

    Args:
        name: a folder, or a name on the hub.
        config: its config.
        args, kwargs: as `PreTrainedModel.from_pretrained` takes them.

    Raises:
        CheckpointError: the predictors are missing, damaged, or of other weights.
        OSError: as the stock class.
    """
    with_notes = kwargs.pop("output_loading_info", False)
    where = {k: kwargs[k] for k in _WHERE if kwargs.get(k) is not None}
    try:
        file = cached_file(name, PREDICTORS, **where)
    except OSError:
        file = None
    if file is None:
        raise CheckpointError(f"{name} holds no {PREDICTORS}; export the model again") from None
    state, stock = read_predictors(Path(file)), config.text_config
    later = _later(config, kwargs)
    int8 = config.fallow["int8"]
    loader: Any = _rounded_class(stock, int8) if int8 else AutoModelForCausalLM
    model, notes = loader.from_pretrained(name, *args, config=stock, output_loading_info=True, **kwargs)
    if int8:
        model.__class__ = loader.__base__
    handle = sparsify(model, Upcycle(**config.fallow["upcycle"]))
    handle.load_state_dict(state)
    handle.set_mode("sparse")
    if later is not None:
        _cast(model, later)
    return (model, notes) if with_notes else model


def _later(config: UpcycleConfig, kwargs: dict[str, Any]) -> torch.dtype | None:
    """float16 where the caller asks for it and the weights are saved in another dtype: its range is so small that the
    hash of the weights would be another, so they are loaded as saved, and cast after the check."""
    asked = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if asked not in (torch.float16, "float16") or config.dtype in (torch.float16, None):
        return None
    kwargs.pop("torch_dtype", None)
    kwargs["dtype"] = config.text_config.dtype = config.dtype
    return torch.float16


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As if loaded in `dtype`: buffers (rotary frequencies) stay as they are, which `.to()` would round."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.like = module.like.to(dtype)
    model.config.dtype = dtype
    model._fallow.set_mode("sparse")  # type: ignore[union-attr, operator]  # what it derived from the weights is dropped


def _rounded_class(config: PreTrainedConfig, layers: list[int]) -> type[PreTrainedModel]:
    """The stock class, made with the FFNs of these layers in 8 bits."""
    with torch.device("meta"):
        stock = type(AutoModelForCausalLM.from_config(config))

    class Rounded(stock):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            ffns = anatomy.inspect(self).ffns
            for n in layers:
                ffns[n].put_int8()

    return Rounded
