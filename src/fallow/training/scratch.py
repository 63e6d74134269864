"""A new model with random weights, of any causal family of transformers, from a recipe's `architecture`.

`AutoConfig.for_model` would do, but it swallows misspelt fields in silence, and then another model trains than the one
asked for. So every field is compared with those of the family's config class, and the finished model reads a few
tokens once: widths that cannot be multiplied, and a model that sees the token it should predict, end here in one line.

The weights are a pure function of (architecture, vocabulary, seed). They are drawn in fp32 and then rounded, so that
runs in bf16 and in fp32 begin at the same place. Cost: drawing them, about 15 ns per weight, twice for bf16.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fallow.anatomy.families import FAMILIES
from fallow.errors import ConfigError
from fallow.training import models
from fallow.training.recipe import Recipe
from fallow.training.settings import closest
from fallow.training.tokenizer import entries, tokenizer_for

_LENGTH = "max_position_embeddings"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SET_ELSEWHERE = {"dtype": "precision", "torch_dtype": "precision"}
_EARLIER_NAMES = ("rope_theta", "rope_scaling")
_TEXT = 160


@dataclasses.dataclass(kw_only=True, slots=True)
class Start:
    """A model before its first step."""

    model: PreTrainedModel
    """Dense, in the dtype that trains, in training mode, on the CPU."""
    tokenizer: PreTrainedTokenizerBase
    """Every id is below the rows of the model's embedding."""
    name: str
    """What run.json calls the model, e.g. `new llama`."""
    tokenizer_origin: str
    """Where a new model's tokenizer is from, in a few words; empty for a loaded model."""


def check(recipe: Recipe) -> None:
    """Raise ConfigError for an architecture that is wrong whatever the tokenizer; nothing is built or read."""
    _config(recipe, None)


def start(recipe: Recipe, dtype: torch.dtype) -> Start:
    """What the recipe trains: a new model where it gives an `architecture`, otherwise the weights of `model`.

    Raises:
        ConfigError: nothing of that name, or the architecture cannot be built or does not fit the tokenizer.
        DataError: a tokenizer is to be trained, and the training text cannot be read.
    """
    if not recipe.architecture:
        model, tokenizer = models.load(recipe.model, recipe.gguf_file, dtype, changes=recipe.config_changes)
        limit = models.longest(model)
        if limit is not None and recipe.seq_len > limit:
            raise ConfigError(
                f"recipe: seq_len={recipe.seq_len} is beyond the {limit} positions of {recipe.model}; lower it, or"
                " extend the model with config_changes: {max_position_embeddings: …, rope_parameters: …}"
            )
        return Start(model=model, tokenizer=tokenizer, name=recipe.model, tokenizer_origin="")
    check(recipe)
    tokenizer, origin = tokenizer_for(recipe)
    config = _config(recipe, tokenizer)
    model = _initialised(config, recipe.seed, dtype)
    model.config.use_cache = False
    return Start(model=model.train(), tokenizer=tokenizer, name=f"new {config.model_type}", tokenizer_origin=origin)


def _initialised(config: PreTrainedConfig, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """Weights drawn in fp32, rounded to `dtype`; the random state outside is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _constructed(config, torch.float32)
        _probe(model)
        if dtype is torch.float32:
            return model
        # not model.to(dtype): that would round the rotary frequencies too, which stock loading keeps in fp32
        rounded = _constructed(config, dtype)
    rounded.load_state_dict(model.state_dict())
    return rounded


def _constructed(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # each family checks its widths in its own way, many by an assertion or a torch error
        raise _impossible(config.model_type, error) from None


def _probe(model: PreTrainedModel) -> None:
    """Read two rows that differ in their last token only: it must run, and the positions before must not notice."""
    ids_BT = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]])
    try:
        with torch.no_grad():
            logits_BTV = model.eval()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
    except Exception as error:  # widths that do not fit each other fail in whichever operation meets them
        raise _impossible(model.config.model_type, error) from None
    if not torch.allclose(logits_BTV[0, :3], logits_BTV[1, :3], rtol=1e-3, atol=1e-4):
        mend = "set is_decoder: true" if hasattr(model.config, "is_decoder") else "take another model_type"
        raise ConfigError(
            f"recipe: architecture: this {model.config.model_type} sees the token it should predict; {mend}"
        )


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The config of the new model; without a tokenizer the vocabulary is only a placeholder."""
    config_class, given = _checked(recipe.architecture)
    names, vocab = config_class.attribute_map, recipe.tokenizer_vocab or 1
    length, size = names.get(_LENGTH, _LENGTH), names.get("vocab_size", "vocab_size")
    filled: dict[str, Any] = {}
    if length in _own_fields(config_class):
        filled[length] = recipe.seq_len
    if tokenizer is not None:
        vocab = entries(tokenizer)
        _fits(names, given, vocab)
        filled |= {name: getattr(tokenizer, name) for name in _TOKENS}
    else:
        filled |= dict.fromkeys(_TOKENS, 0)
    fields: dict[str, Any] = {size: vocab} | filled | given
    try:
        config = config_class(**fields)
    except Exception as error:  # strict configs, older ones and rope checks each raise their own kinds
        raise _impossible(config_class.model_type, error) from None
    if isinstance(given.get(length), int) and given[length] < recipe.seq_len:
        raise ConfigError(
            f"recipe: architecture: {length}={given[length]} is shorter than seq_len={recipe.seq_len};"
            f" lower seq_len, raise {length}, or leave it out"
        )
    return config


def _checked(architecture: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config class and the fields given, under the class's own names. Raises ConfigError for one it lacks."""
    model_type = architecture.get("model_type")
    if not isinstance(model_type, str):
        wrong = "is missing" if model_type is None else f"is {model_type!r}, not one name"
        raise ConfigError(f"recipe: architecture: model_type {wrong}; e.g. architecture: {{model_type: llama}}")
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        wrong = "is no causal language model" if model_type in CONFIG_MAPPING else "is unknown to transformers"
        raise ConfigError(f"recipe: architecture: model_type {model_type!r} {wrong}{closest(model_type, FAMILIES)}")
    config_class = CONFIG_MAPPING[model_type]
    own = _own_fields(config_class)
    if config_class.attribute_map.get("vocab_size", "vocab_size") not in own:
        texts = [t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t.startswith(f"{model_type}_")]
        mend = f"use model_type: {texts[0]}" if texts else f"use a text model{closest(model_type, FAMILIES)}"
        raise ConfigError(f"recipe: architecture: {model_type} has no vocabulary of its own; {mend}")
    earlier = _EARLIER_NAMES if "rope_parameters" in own else ()
    given: dict[str, Any] = {}
    for name, value in architecture.items():
        if name in _SET_ELSEWHERE:
            raise ConfigError(f"recipe: architecture: {name} is not set here; use {_SET_ELSEWHERE[name]}: bf16 or fp32")
        if name not in own and name not in config_class.attribute_map and name not in (*earlier, "model_type"):
            near = closest(name, [*own, *config_class.attribute_map])
            raise ConfigError(f"recipe: architecture: {model_type} has no field {name!r}{near}")
        if name != "model_type":
            own_name = config_class.attribute_map.get(name, name)
            given[own_name] = _number(value, getattr(config_class, own_name, None))
    return config_class, given


def _own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """Fields that the family's config adds to those of every config (older transformers: an `__init__`)."""
    if dataclasses.is_dataclass(config_class):
        common = (
            {f.name for f in dataclasses.fields(PreTrainedConfig)} if dataclasses.is_dataclass(PreTrainedConfig) else ()
        )
        found = [f.name for f in dataclasses.fields(config_class) if f.name not in common]
    else:
        found = [
            n for n, p in inspect.signature(config_class.__init__).parameters.items() if p.kind is not p.VAR_KEYWORD
        ]
    return [name for name in found if not name.startswith("_") and name != "self"]


def _number(value: Any, default: Any) -> Any:
    """`1e-5`, which YAML reads as text, and `12` for a field whose default is 1.0, as floats."""
    wanted = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
    if wanted or isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _fits(names: dict[str, str], given: dict[str, Any], vocab: int) -> None:
    """Raise ConfigError where the fields given have too few embeddings for the tokenizer, or for a special token."""
    size = names.get("vocab_size", "vocab_size")
    rows = given.get(size, vocab)
    if not isinstance(rows, int):
        return  # the config says so itself
    if rows < vocab:
        raise ConfigError(
            f"recipe: architecture: {size}={rows} is smaller than the tokenizer's {vocab} entries;"
            f" leave {size} out, or take a smaller tokenizer (tokenizer_vocab)"
        )
    for name in _TOKENS:
        ids = given.get(name) if isinstance(given.get(name), list) else [given.get(name)]
        if any(isinstance(i, int) and not 0 <= i < rows for i in ids or ()):
            raise ConfigError(
                f"recipe: architecture: {name}={given[name]} lies outside the {rows} embeddings; leave it out"
            )


def _impossible(model_type: str, error: Exception) -> ConfigError:
    said = " ".join(str(error).split()) or type(error).__name__
    said = f"unknown name {said}" if isinstance(error, KeyError) else said
    said = said if len(said) <= _TEXT else said[:_TEXT] + "…"
    return ConfigError(
        f"recipe: architecture: no {model_type} can be built so ({said}); correct that field, or the widths:"
        " hidden_size a multiple of the heads, the heads a multiple of the key-value heads"
    )
