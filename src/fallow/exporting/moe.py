"""SSD's experts as a stock MoE model: the folding, the checks, and the comparison before the folder gets its name.

SSD adds up the outputs of the chosen experts; stock engines multiply each by its router probability first. Written
as they are, the weights give another model (54 % top-1 agreement in our trial). So, in the weights:

* router x 2^-10 over its largest row norm: the softmax is flat to 0.1 %, the order of the experts stays;
* down x K where the engine renormalises the chosen probabilities, x E where it does not: the flat weights cancel;
* ReGLU for engines that compute SiLU: silu(S g) / S is relu(g) within 0.28 / S. The gate takes S, up and down each
  give half of it back, so that in 16 bits neither the hidden values nor the weights leave the range. ReLU² of two
  matrices is ReGLU with up = gate. `hidden_act: relu` would need no S, but not every engine reads it.

All factors but K or E are powers of two: exact in every float format. K or E is applied in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fallow.anatomy import FFNView
from fallow.errors import ConfigError, UnsupportedModelError
from fallow.exporting import Written
from fallow.exporting.agreement import MOE_BOUNDS, agreement, bounds_of, reference, require
from fallow.exporting.hf import take_buffers
from fallow.exporting.stock import StockTensors, as_evaluated, refuse_odd_keys
from fallow.exporting.traits import NAMES, traits

_SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "rope_parameters"),
)
_ROUTER_SCALE = 2.0**-10
_GATE_SCALE = 2.0**10
_GATE_SCALE_FP16 = 2.0**8  # silu(S g) must stay below 65504


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A stock MoE architecture as a target."""

    name: str
    """Its model_type, and the name of the target."""
    expresses: frozenset[str]
    """Keys of `traits` that its config can express; plain Llama is expressed by all."""
    requires: frozenset[str] = frozenset()
    """Keys of `traits` it cannot go without."""
    weighting: Literal["renormalised", "raw"]
    """Whether the probabilities of the chosen experts are divided by their sum."""
    settings: Callable[[PreTrainedModel, Experts], dict[str, Any]]
    """Config fields beyond those all engines share."""
    ffn: Callable[[str, Folded], dict[str, Tensor]]
    """(prefix of the decoder layer, folded experts) -> tensors as the engine's checkpoints name them."""
    rest: Callable[[PreTrainedModel], dict[str, Tensor]] = lambda model: {}
    """Tensors the engine has and the model has not."""


class Experts(NamedTuple):
    """What is the same in every layer, because one config describes all of them."""

    n_experts: int
    active: int
    channels: int
    layers: list[Any]


class Folded(NamedTuple):
    """One layer's experts with the engine's arithmetic undone."""

    router_ED: Tensor
    gate_ECD: Tensor
    up_ECD: Tensor
    down_EDC: Tensor


def experts_of(model: PreTrainedModel, target: str) -> Experts:
    """The model's experts; SSD groups the neurons now if it has not yet.

    Raises:
        ConfigError: the model is not held by SSD, or its layers differ in experts.
    """
    handle = getattr(model, "_fallow", None)
    if not hasattr(handle, "experts"):
        raise ConfigError(
            f"export: {target} needs experts and this model has none; train with method ssd, or group a ReLU model's"
            " neurons first: fallow.sparsify(model, fallow.SSD())"
        )
    layers: list[Any] = handle.experts()  # type: ignore[union-attr]
    shapes = {(x.n_experts, x.active, x.view.n_channels) for x in layers}
    if len(shapes) != 1 or len(layers) != model.config.num_hidden_layers:
        raise ConfigError(
            f"export: {target} has one number of experts, of active experts and of channels for all layers; here"
            f" (experts, active, channels) are {', '.join(map(str, sorted(shapes)))}; export to hf, or train with one"
        )
    n_experts, active, channels = shapes.pop()
    return Experts(n_experts, active, channels // n_experts, layers)


def check(
    model: PreTrainedModel, ffns: list[FFNView], target: str, expresses: frozenset[str], requires: Iterable[str] = ()
) -> None:
    """Raises UnsupportedModelError, naming the property the target cannot express or go without; see `Engine`."""
    found = traits(model, ffns)
    kind = model.config.model_type
    if odd := [words for key, words in found.items() if key not in expresses]:
        raise UnsupportedModelError(
            f"export: {target} cannot express {odd[0]} of this {kind} model; choose another target"
        )
    if lacking := sorted(set(requires) - found.keys()):
        raise UnsupportedModelError(
            f"export: {target} always has {NAMES[lacking[0]]}, which this {kind} model has not; choose another target"
        )


def check_activation(view: FFNView, target: str) -> None:
    """Raises UnsupportedModelError where the FFN is not ReGLU, SwiGLU or ReLU² of two matrices."""
    if (view.kind, view.act) not in {("gated", "relu"), ("gated", "silu"), ("plain", "relu2")}:
        raise UnsupportedModelError(
            f"export: {target} computes gated FFNs with SiLU; {view.name} is {view.kind} with {view.act}, which cannot"
            " be folded into it (gated relu, gated silu and two-matrix relu2 can)"
        )


@torch.no_grad()
def fold(
    layer: Any,
    weighting: Literal["renormalised", "raw"],
    *,
    dtype: torch.dtype | None = None,
    router_dtype: torch.dtype | None = None,
) -> Folded:
    """One layer's experts, folded.

    Args:
        layer: one item of `handle.experts()`.
        weighting: see `Engine`.
        dtype: of the result; default: the weights' own.
        router_dtype: of the router; default: `dtype`.
    """
    view, E = layer.view, layer.n_experts
    total = layer.active if weighting == "renormalised" else E
    gate_FD, up_FD, down_DF = fold_dense(view, dtype=dtype, down_times=total)
    return Folded(
        router_ED=(layer.router.detach().float() * router_scale(layer.router)).to(router_dtype or gate_FD.dtype),
        gate_ECD=gate_FD.view(E, -1, view.d_model),
        up_ECD=up_FD.view(E, -1, view.d_model),
        down_EDC=down_DF.view(view.d_model, E, -1).transpose(0, 1).contiguous(),
    )


@torch.no_grad()
def fold_dense(
    view: FFNView, *, dtype: torch.dtype | None = None, down_times: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(gate [F, D], up [F, D], down [D, F]) of which SwiGLU is the FFN, `down_times` as large."""
    w = view.weights()
    dtype = dtype or w.w_up_FD.dtype
    scale = 1.0 if view.act == "silu" else _GATE_SCALE_FP16 if dtype == torch.float16 else _GATE_SCALE
    half = scale**-0.5
    gate_FD = w.w_up_FD if w.w_gate_FD is None else w.w_gate_FD
    factors = ((gate_FD, scale), (w.w_up_FD, half), (w.w_down_DF, down_times * half))
    gate, up, down = ((x.float() * factor).to(dtype).contiguous() for x, factor in factors)
    return gate, up, down


def router_scale(router_ED: Tensor) -> float:
    """The power of two by which a router is multiplied before its softmax."""
    largest = float(router_ED.detach().float().norm(dim=1).max())
    return _ROUTER_SCALE / 2.0 ** round(torch.tensor(max(largest, 1e-30)).log2().item())


def write_stock(model: PreTrainedModel, folder: Path, engine: Engine) -> Written:
    """Fill `folder` with a stock MoE model, load it with transformers, and compare.

    Raises:
        ConfigError, UnsupportedModelError: see `experts_of`, `check`, `check_activation`, `StockTensors`.
        CheckpointError: what was written does not answer as the model does.
    """
    tensors = StockTensors(model)
    experts = experts_of(model, engine.name)
    check(model, [layer.view for layer in experts.layers], engine.name, engine.expresses, engine.requires)
    config = stock_config(model, experts, engine)
    state = kept_tensors(model, tensors, experts) | engine.rest(model)
    for layer in experts.layers:
        check_activation(layer.view, engine.name)
        state |= engine.ffn(layer.view.name.rpartition(".")[0], fold(layer, engine.weighting))
    save_torch_state_dict(
        {name: x.cpu().clone(memory_format=torch.contiguous_format) for name, x in state.items()}, folder
    )
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr]
    del state
    return Written(dense_bytes=tensors.nbytes(), packed_layers=0, verified=_verify(model, folder, engine.name))


def stock_config(model: PreTrainedModel, experts: Experts, engine: Engine) -> Any:
    """The engine's config: what the architectures share, the experts, and the engine's own settings."""
    source: Any = model.config
    settings: dict[str, Any] = {name: getattr(source, name) for name in _SHARED}
    settings |= {"hidden_act": "silu", "num_experts_per_tok": experts.active} | engine.settings(model, experts)
    config = CONFIG_MAPPING[engine.name](**settings)
    config.dtype, config.architectures = model.dtype, [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[engine.name]]
    return config


def kept_tensors(model: PreTrainedModel, tensors: StockTensors, experts: Experts) -> dict[str, Tensor]:
    """Everything but the FFNs, under its stock name; what is tied once."""
    ffns = tuple(f"{layer.view.name}." for layer in experts.layers)
    tied = tensors.tied if model.config.tie_word_embeddings else {}
    return {name: tensors[name] for name in tensors.names if not name.startswith(ffns) and name not in tied}


def _verify(model: PreTrainedModel, folder: Path, target: str) -> list[str]:
    answer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    loaded, notes = answer
    refuse_odd_keys(notes)
    what = f"{target} by stock transformers"
    with as_evaluated(model, "sparse"):
        take_buffers(model, loaded)
        ids_BT, wanted_BTV = reference(model)
        bounds, floor = bounds_of(model, ids_BT, wanted_BTV, MOE_BOUNDS)
        found_BTV = loaded.to(model.device)(input_ids=ids_BT, use_cache=False).logits.float()
        return [require(agreement(wanted_BTV, found_BTV), what, bounds), *floor]
