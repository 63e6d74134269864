"""`inspect(model)`: the family's row of the table, applied to a model, or an error that says what was looked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from fallow.anatomy.attention import AttentionView
from fallow.anatomy.families import CONFIG_ACTIVATIONS, FAMILIES, Family
from fallow.anatomy.ffn import FFNView
from fallow.anatomy.linear import LinearView, as_linear
from fallow.anatomy.slot import Slot
from fallow.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True, slots=True)
class Anatomy:
    """What of a model can be made sparse, layer by layer in order."""

    family: str
    """The config's `model_type`, a key of `families.FAMILIES`."""
    ffns: list[FFNView]
    """One per decoder layer."""
    attentions: list[AttentionView]
    """One per decoder layer."""
    linears: list[LinearView]
    """Every linear layer inside the decoder layers, in module order; not the embeddings or the head."""
    d_model: int
    """Width of the residual stream, D."""
    n_layers: int
    layers: list[nn.Module]
    """The decoder layer modules."""


def inspect(model: PreTrainedModel) -> Anatomy:
    """Find the FFNs, attentions and linear layers of `model`, a causal language model or its base model.

    Raises:
        UnsupportedModelError: the family is not in the table, or the model is not built as its row says; the message
            lists the paths looked for and the families known.
        ConfigError: a view of an earlier inspection is still installed in the model.
    """
    family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if family not in FAMILIES:
        raise UnsupportedModelError(_unknown(model, family))
    row = FAMILIES[family]
    path, layers = _layers(model, row)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({family}) has no decoder layers at {row.layers}; pass the causal language model"
        )
    _reject_installed(model)
    ffns, attentions, linears = [], [], []
    for i, layer in enumerate(layers):
        name = f"{path}.{i}"
        missing = [p for p in (*row.ffn.paths(), *row.attention.paths()) if not _has(layer, p)]
        if missing:
            raise UnsupportedModelError(
                f"{name} of this {family} model lacks {', '.join(missing)}; anatomy/families.py describes another "
                "layout for this family: was the model changed, or is its transformers version too old or too new?"
            )
        ffn_name = f"{name}.{row.ffn.path}" if row.ffn.path else name
        holder = layer.get_submodule(row.ffn.path)
        ffns.append(FFNView(name=ffn_name, layer=i, holder=holder, decoder_layer=layer, layout=row.ffn))
        attention = layer.get_submodule(row.attention.path)
        attention_name = f"{name}.{row.attention.path}"
        attentions.append(AttentionView(name=attention_name, layer=i, module=attention, layout=row.attention))
        linears += [
            LinearView(name=f"{name}.{child}", layer=i, module=as_linear(module, f"{name}.{child}"))
            for child, module in layer.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        ]
    return Anatomy(
        family=family,
        ffns=ffns,
        attentions=attentions,
        linears=linears,
        d_model=ffns[0].d_model,
        n_layers=len(layers),
        layers=layers,
    )


def put_relu(model: PreTrainedModel, found: Anatomy) -> None:
    """ReLU as the activation of every FFN, in the modules and in the config, so that the model is saved as what it is
    now. For good: the trained weights are those of a ReLU model."""
    for view in found.ffns:
        view.put_relu()
    for name in CONFIG_ACTIVATIONS:
        if hasattr(model.config, name):
            setattr(model.config, name, "relu")


def _layers(model: nn.Module, row: Family) -> tuple[str, list[nn.Module]]:
    """Path and modules of the decoder layers; a base model lacks the first part of the path."""
    for path in (row.layers, row.layers.partition(".")[2]):
        if _has(model, path):
            found = model.get_submodule(path)
            if isinstance(found, nn.ModuleList):
                return path, list(found)
    return row.layers, []


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _reject_installed(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Slot):
            raise ConfigError(
                f"{name} is a {type(module).__name__} of fallow: the model is sparse already; "
                "call remove() on its handle"
            )


def _unknown(model: nn.Module, family: str) -> str:
    """One line: each distinct layout, where it was looked for, and what of it was found."""
    looked = []
    rows: dict[Family, list[str]] = {}
    for name, row in FAMILIES.items():
        rows.setdefault(row, []).append(name)
    for row, names in rows.items():
        path, layers = _layers(model, row)
        wanted = (*row.ffn.paths(), *row.attention.paths())
        found = [p for p in wanted if layers and _has(layers[0], p)]
        if not layers:
            state = "no such layers"
        elif len(found) == len(wanted):
            state = f"all found: if its attention and FFN code equal {names[0]}'s, one table row supports it"
        else:
            state = f"lacks {', '.join(p for p in wanted if p not in found)}"
        looked.append(f"{'/'.join(names)}: {path}.0.{{{','.join(wanted)}}} ({state})")
    return (
        f"no table row for model_type {family!r} ({type(model).__name__}); known: {', '.join(FAMILIES)}. Looked for "
        f"{'; '.join(looked)}. To add the family, see the head of fallow/anatomy/families.py"
    )
