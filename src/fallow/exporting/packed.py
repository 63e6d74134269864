"""A folder without the zeros: `packed.safetensors`, `fallow-packed.json`, config and generation config.

A linear layer NAME of the blocks, [O, I] with n weights that are not zero, is stored as

    NAME.values  [n], row-major         NAME.bitmap  uint8 [O, ceil(I/8)], see ops/packed/layout.py

where that takes fewer bytes than the dense weight: below density 15/16 in 16 bits, 31/32 in 32. All other tensors are
dense. Indices instead of a bitmap (CSR) would be smaller below density 1/32 only. The weights are not called
model.safetensors, because stock transformers would then load the folder and draw the missing weights at random.

fallow-packed.json: {"format": 1, "fallow": version, "dtype", "layers": {NAME: {"shape": [O, I], "transposed": whether
the stock weight is [I, O]}}, "tied": {tensor: the stored tensor it shares}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from fallow import __version__, anatomy
from fallow.errors import CheckpointError, UnsupportedModelError
from fallow.exporting import Written
from fallow.exporting.stock import StockTensors, compare, config_of
from fallow.ops import packed

INDEX, WEIGHTS, FORMAT = "fallow-packed.json", "packed.safetensors", 1


def write(model: PreTrainedModel, folder: Path) -> Written:
    """Fill `folder` and verify it.

    Raises:
        ConfigError: see `StockTensors`.
        UnsupportedModelError: the family is unknown, or the model is not what stock transformers builds of its config.
        CheckpointError: what was written does not load as the same model.
    """
    tensors = StockTensors(model)
    config_of(model).save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr]
    skeleton = _skeleton(folder)
    if odd := sorted(skeleton.state_dict().keys() ^ set(tensors.names)):
        raise UnsupportedModelError(
            f"export: {odd[0]} is in this model or in a stock {type(skeleton).__name__}, not in both; remove the"
            " method's handle or undo the change first"
        )
    transposed = {view.name: anatomy.out_dim(view.module) == 1 for view in anatomy.inspect(skeleton).linears}
    stored: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name in tensors.names:
        if name in tensors.tied:
            continue
        weight = tensors[name].cpu()
        layer = name.removesuffix(".weight")
        pair = _pack(weight.t() if transposed[layer] else weight) if layer in transposed else None
        if pair is None:
            stored[name] = weight.contiguous()
            continue
        stored[f"{layer}.values"], stored[f"{layer}.bitmap"] = pair
        shape = list(weight.t().shape if transposed[layer] else weight.shape)
        layers[layer] = {"shape": shape, "transposed": transposed[layer]}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    dtype = str(model.dtype).removeprefix("torch.")
    index = {"format": FORMAT, "fallow": __version__, "dtype": dtype, "layers": layers, "tied": tensors.tied}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    del stored
    verified = [compare(tensors, load_packed(folder), "export")]
    return Written(dense_bytes=tensors.nbytes(), packed_layers=len(layers), verified=verified)


def _pack(weight_OI: Tensor) -> tuple[Tensor, Tensor] | None:
    """(values, bitmap) of a dense weight, or None where they would not be smaller."""
    alive_OI = weight_OI != 0
    bitmap_bytes = alive_OI.shape[0] * -(-alive_OI.shape[1] // 8)
    if int(alive_OI.sum()) * weight_OI.element_size() + bitmap_bytes >= weight_OI.nbytes:
        return None
    layout = packed.layout_of(alive_OI)
    return packed.compress(weight_OI.contiguous(), layout), layout.bitmap_OB


def load_packed(path: str | Path) -> PreTrainedModel:
    """The stock model of a folder that `export(..., to="packed")` wrote: dense, zeros filled in, on the CPU, in
    evaluation mode and in the dtype it was exported from.

    Raises:
        CheckpointError: a file is missing, corrupt, of an unknown version, or does not fit the config; the message
            names the file and the tensor.
    """
    folder = Path(path).expanduser()
    index = _read_index(folder / INDEX)
    skeleton = _skeleton(folder)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    state = _read_tensors(folder / WEIGHTS, index, shapes)
    dtype = getattr(torch, index["dtype"])
    # given a state, from_pretrained ties, converts and registers as for any folder, and copies nothing
    model = type(skeleton).from_pretrained(None, config=skeleton.config, state_dict=dict(state), dtype=dtype)
    for name, tensor in model.state_dict().items():
        if tensor.dtype != state[name].dtype:  # one parameter of another dtype than the rest
            owner, _, leaf = name.rpartition(".")
            getattr(model.get_submodule(owner), leaf).data = state[name]
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _skeleton(folder: Path) -> PreTrainedModel:
    """The stock model of the folder's config, without memory. Raises CheckpointError where there is no such config."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is missing or corrupt ({' '.join(str(error).split())[:120]}); export it again"
        ) from None


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text())
        version, layers, tied = index["format"], index["layers"], index["tied"]
        whole = isinstance(tied, dict) and isinstance(getattr(torch, index["dtype"]), torch.dtype)
        whole = whole and all(len(x["shape"]) == 2 and isinstance(x["transposed"], bool) for x in layers.values())
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing: not a packed export; write one with export(..., to='packed')"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        index, version, whole = {}, None, False
    if version is not None and version != FORMAT:
        raise CheckpointError(
            f"{file} is of format {version!r}, this fallow reads {FORMAT}; use the fallow that wrote it"
        )
    if not whole:
        raise CheckpointError(f"{file} is corrupt; export it again")
    return index


def _read_tensors(file: Path, index: dict[str, Any], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Every tensor of the stock model, dense. Raises CheckpointError unless the file holds those and no others."""
    layers: dict[str, dict[str, Any]] = index["layers"]
    state: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as source:
            left = set(source.keys())

            def take(name: str) -> Tensor:
                if name not in left:
                    raise CheckpointError(f"{file}: {name} is missing; export it again")
                left.remove(name)
                return source.get_tensor(name)

            for layer, entry in layers.items():
                weight = _unpack(take, layer, tuple(entry["shape"]), file)
                state[f"{layer}.weight"] = weight.t().contiguous() if entry["transposed"] else weight
            for name in shapes:
                if name not in state and name not in index["tied"]:
                    state[name] = take(name)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; export it again") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt ({' '.join(str(error).split())[:120]})") from None
    state |= {name: state[first] for name, first in index["tied"].items() if first in state}
    if odd := sorted([*left, *(state.keys() ^ shapes.keys())]):
        raise CheckpointError(f"{file}: {odd[0]} does not belong to the model of config.json; export it again")
    for name, tensor in state.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{file}: {name} is {tuple(tensor.shape)}, config.json makes it {tuple(shapes[name])}; it is of another"
                " model"
            )
    return state


def _unpack(take: Any, layer: str, shape: tuple[int, int], file: Path) -> Tensor:
    """[O, I] of a packed layer; `take(name)` reads a tensor."""
    values, bitmap_OB = take(f"{layer}.values"), take(f"{layer}.bitmap")
    layout = packed.layout_from_bitmap(bitmap_OB, shape[1], name=f"{file}: {layer}.bitmap")
    if bitmap_OB.shape[0] != shape[0]:
        raise CheckpointError(f"{file}: {layer}.bitmap has {bitmap_OB.shape[0]} rows, {INDEX} says {shape[0]}")
    if values.dim() != 1 or not values.is_floating_point() or values.numel() != layout.n_active:
        raise CheckpointError(
            f"{file}: {layer}.values is {values.dtype} {tuple(values.shape)}, but {layer}.bitmap marks"
            f" {layout.n_active} weights: it is corrupt; export it again"
        )
    return packed.expand(values, layout)
