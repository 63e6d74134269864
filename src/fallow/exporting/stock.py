"""A model's tensors under the names and in the shapes of the stock model, whether a method holds it or not.

SAT leaves every parameter in its place. SMET's layers have `values` and `bitmap` where the stock layer has `weight`,
and those of an int8 export `codes` and `scale`; that weight is built when it is asked for, one at a time, so the dense
model never exists twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fallow import anatomy
from fallow.anatomy.int8 import Int8Linear
from fallow.errors import CheckpointError, ConfigError, UnsupportedModelError
from fallow.methods.smet.layers import SparseLinear

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


class StockTensors:
    """Name -> tensor of a model, as the stock model stores them.

    Args:
        model: a causal language model; stock, or made sparse by fallow.

    Raises:
        ConfigError: no causal language model, sharded over ranks, or with adapters.
        UnsupportedModelError: quantised weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _check(model)
        self._built: dict[str, SparseLinear | Int8Linear] = {}
        self._plain: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}
        """Name -> the name that comes first in the model and shares its storage."""
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear | Int8Linear)}
        self.names: list[str] = []
        seen: dict[tuple[Any, ...], str] = {}
        for name, tensor in model.state_dict().items():
            owner, _, leaf = name.rpartition(".")
            if owner in layers and leaf != "bias":
                if leaf in ("values", "codes"):
                    self._built[f"{owner}.weight"] = layers[owner]
                    self.names.append(f"{owner}.weight")
                continue
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
            if (first := seen.setdefault(place, name)) != name:
                self.tied[name] = first
            self._plain[name] = tensor
            self.names.append(name)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        """The tensor: the model's own, or a new one: of a sparse layer with zeros where its weights are dead."""
        if name in self._plain:
            return self._plain[name].detach()
        layer = self._built[name]
        if isinstance(layer, Int8Linear):
            return layer.weight.contiguous()
        weight_OI = layer.dense_weight().detach()
        return weight_OI if anatomy.out_dim(layer.stock) == 0 else weight_OI.t().contiguous()  # type: ignore[arg-type]

    def nbytes(self) -> int:
        """Bytes of all tensors when dense; shared storage counts once."""
        plain = sum(t.nbytes for name, t in self._plain.items() if name not in self.tied)
        return plain + sum(x.out_features * x.in_features * _width(x) for x in self._built.values())


def _width(layer: SparseLinear | Int8Linear) -> int:
    """Bytes of one of its weights when dense."""
    return (layer.like if isinstance(layer, Int8Linear) else layer.values).element_size()


def _check(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"export needs the Hugging Face model, not a {type(model).__name__}; a handle has it as .model"
        )
    if model.get_output_embeddings() is None:
        raise ConfigError(f"export: {type(model).__name__} has no language-model head; pass the causal language model")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError("export: the model has adapters; merge them first")
    if getattr(model, "is_quantized", False):
        raise UnsupportedModelError("export: the weights are quantised; dequantise the model first")
    if any(isinstance(p, DTensor) or p.is_meta for p in model.parameters()):
        raise ConfigError("export: the model is sharded or has no weights; gather it on one rank first")


def compare(
    wanted: StockTensors,
    loaded: PreTrainedModel,
    what: str,
    *,
    changed: Mapping[str, Tensor] = MappingProxyType({}),
) -> str:
    """Compare every tensor of the two bit for bit (in `loaded`'s dtype; -0 counts as 0), and say so.

    Args:
        wanted, loaded: the two.
        what: begins the messages.
        changed: tensors that are to be other ones than in `wanted`.

    Raises:
        CheckpointError: they differ; the message names the first tensor that does.
    """
    found = StockTensors(loaded)
    if odd := sorted(set(found.names) ^ set(wanted.names)):
        raise CheckpointError(f"{what}: loaded again, {odd[0]} is in one model only; nothing was written")
    for name in wanted.names:
        theirs = found[name]
        if not same_bits(changed.get(name, wanted[name]).to(theirs), theirs):
            raise CheckpointError(f"{what}: loaded again, {name} differs from the model's; nothing was written")
    meant = f", {len(changed)} of them after rounding" if changed else ""
    return f"loaded again: {len(wanted.names)} tensors equal the model's bit for bit{meant}"


def refuse_odd_keys(notes: dict[str, Any]) -> None:
    """Raises CheckpointError where the loading info of `from_pretrained` has keys of any kind that it should not."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes[problem]:
            name = sorted(map(str, notes[problem]))[0]
            raise CheckpointError(
                f"export: stock transformers finds {problem.replace('_', ' ')} in what was written, e.g. {name};"
                " nothing was written"
            )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, -0 counted as 0."""
    if a.shape != b.shape:
        return False
    if torch.equal(a, b) or not a.is_floating_point():
        return torch.equal(a, b)
    # unequal as numbers: only NaNs of the same bits excuse it
    return bool(((a == b) | (_bits(a) == _bits(b))).all())


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def config_of(model: PreTrainedModel) -> Any:
    """The model's config as a stock folder has it: with the dtype of the weights and the name of the class."""
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    return config


@contextmanager
def as_evaluated(model: PreTrainedModel, mode: Literal["dense", "sparse"] = "dense") -> Iterator[None]:
    """Evaluation mode, the random state kept; afterwards as before, module by module. Dense: every neuron computed."""
    flags = [(module, module.training) for module in model.modules()]
    handle = getattr(model, "_fallow", None)
    try:
        model.eval()
        in_mode = handle.in_mode(mode) if handle is not None else nullcontext()
        with in_mode, torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def load_folder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model of a stock or packed folder, in the dtype it was saved in, and its tokenizer if there is one.

    Raises:
        ConfigError: the folder holds no causal language model.
        CheckpointError: a packed folder is corrupt.
    """
    from fallow.exporting import packed

    try:
        if (folder / packed.INDEX).is_file():
            model = packed.load_packed(folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        has_tokenizer = any((folder / file).is_file() for file in _TOKENIZERS)
        return model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    except CheckpointError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{folder} cannot be loaded ({' '.join(str(error).split())[:200]}); check it") from None
