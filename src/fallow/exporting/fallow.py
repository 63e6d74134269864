"""`--to fallow`: an Upcycle model with its predictors, which `import fallow` lets stock transformers load.

    model.safetensors          the stock weights under their stock names; with int8, FFN weights as NAME.codes and
                               NAME.scale, a row per channel (`anatomy/int8.py`)
    predictors.safetensors     predictors, what each layer keeps, and the hash of the weights they belong to
    config.json                the stock config and the settings (`upcycle_config.py`)
    generation_config.json, tokenizer files: as in a stock folder

Verified by loading it the stock way, in fp32 (why: `agreement.py`): tensors bit for bit, logits of the sparse forward
as in training (many tokens, dense GEMMs and a mask), and what every FFN makes of a few tokens, as in decoding (living
rows only). The latter layer by layer, each from the same inputs: int8 kernels round inputs by 1e-5, and in a deep model
a near tie of scores anywhere makes logits of that. With int8 the model in hand answers with the same rounded weights,
so that rounding, which is meant, hides no mistake; what it costs is told beside. Cost: the weights twice in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fallow import __version__
from fallow.anatomy.int8 import Int8Linear
from fallow.errors import CheckpointError, ConfigError
from fallow.exporting import Written
from fallow.exporting.agreement import Bounds, agreement, probe, require
from fallow.exporting.hf import save, take_buffers
from fallow.exporting.rounding import Rounded, round_ffns
from fallow.exporting.stock import StockTensors, as_evaluated, compare, refuse_odd_keys
from fallow.exporting.upcycle_config import FORMAT, UpcycleConfig, UpcycledForCausalLM
from fallow.exporting.upcycled import PREDICTORS, settings_of, write_predictors
from fallow.methods.upcycle import UpcycleMethod
from fallow.methods.upcycle.fingerprint import fingerprint
from fallow.ops.bank_ffn import MOST_TOKENS

BOUNDS = Bounds(top1=0.995, error=0.01)
DECODING = 0.01
"""Mean |difference| over mean |output| of an FFN."""
_TEXT = "The quick brown fox\n\tjumps over 13 lazy dogs: äöü, 你好, naïve! def f(x): return x**2"


class _Answers(NamedTuple):
    logits_BTV: Tensor
    """Computed as in training."""
    ffns: list[tuple[Tensor, Tensor]]
    """Of each layer a few inputs [t, D] and outputs, computed as in decoding."""
    watched: tuple[float, Tensor] | None
    """On the batch that training watched, if there is one: nats per token, and the likeliest tokens."""


def write(model: PreTrainedModel, folder: Path, *, int8: bool = False) -> Written:
    """Fill `folder` and verify it.

    Raises:
        ConfigError: no Upcycle holds the model, a control chooses its channels, or it is in 8 bits already; see also
            `StockTensors`.
        CheckpointError: what was written does not load as the same model.
    """
    handle, tensors = _handle(model), StockTensors(model)
    with as_evaluated(model, "sparse"):
        single = {n: x.float() for n, x in (*model.named_parameters(), *model.named_buffers()) if x.is_floating_point()}
        before = _answers(model, single, handle)  # starts the predictors that have not been
        rounded = round_ffns(model, handle, single) if int8 else Rounded([], {}, {}, [])
        wanted = _answers(model, single | rounded.whole, handle) if int8 else before
        del single
        kept = {name: tensors[name] for name in tensors.names if name not in rounded.whole}
        save(model, folder, kept | rounded.stored)
        _write_config(handle, folder, int8=rounded.layers)
        belong = {"weights": fingerprint(handle.layers, rounded.whole)}
        write_predictors(handle.state_dict() | belong, folder / PREDICTORS)
        loaded = _load(folder)
        said = [compare(tensors, loaded, "export", changed=rounded.whole), *_tokenizer_words(folder)]
        take_buffers(model, loaded)
        found = _answers(loaded.to(model.device), {}, handle, wanted.ffns)  # type: ignore[arg-type]
        what = "the folder by stock transformers and `import fallow`"
        said.append(require(agreement(wanted.logits_BTV, found.logits_BTV), what, BOUNDS))
        said.append(_same_decoding(wanted, found))
        if int8:
            said += [*rounded.said, _price(before, found)]
    return Written(dense_bytes=tensors.nbytes(), packed_layers=0, verified=said)


def _handle(model: PreTrainedModel) -> UpcycleMethod:
    handle = getattr(model, "_fallow", None)
    if handle is None:
        raise ConfigError(
            "export: fallow writes models with Upcycle's predictors, and this one has none; train it with method"
            " upcycle, or make it sparse as it is: fallow.sparsify(model, fallow.Upcycle()); or export it to hf"
        )
    if not isinstance(handle, UpcycleMethod):
        raise ConfigError(
            f"export: fallow writes models with Upcycle's predictors, and this one is held by {handle.name}; export it"
            " to hf, or packed (smet), or mixtral and others (ssd)"
        )
    if odd := {layer.selection for layer in handle.layers} - {"predictor"}:
        raise ConfigError(
            f"export: selection={odd.pop()!r} is a control for experiments, which reads every weight; export a model"
            " whose predictors choose (selection='predictor')"
        )
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ConfigError("export: this model is in int8 already; copy its folder, or export the run it came from")
    return handle


def _write_config(handle: UpcycleMethod, folder: Path, *, int8: list[int]) -> None:
    """Put the stock config that lies in `folder` into one of ours."""
    file = folder / "config.json"
    stock = json.loads(file.read_text())
    about = {"format": FORMAT, "version": __version__, "int8": int8, "upcycle": settings_of(handle)}
    config = {
        "architectures": [UpcycledForCausalLM.__name__],
        "model_type": UpcycleConfig.model_type,
        "dtype": stock.get("dtype"),
        "fallow": about,
        "text_config": stock,
    }
    file.write_text(json.dumps(config, indent=2) + "\n")


def _load(folder: Path) -> PreTrainedModel:
    answer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    loaded, notes = answer
    refuse_odd_keys(notes)
    return loaded


def _tokenizer_words(folder: Path) -> list[str]:
    """Whether `AutoTokenizer` finds the same tokenizer as beside the stock config, where there is one."""
    if not (folder / "tokenizer_config.json").is_file():
        return []
    stock = AutoConfig.from_pretrained(folder).text_config
    found, wanted = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, config=stock)
    if type(found) is not type(wanted) or found(_TEXT)["input_ids"] != wanted(_TEXT)["input_ids"]:
        raise CheckpointError(
            f"export: AutoTokenizer finds a {type(found).__name__} in what was written, and beside the stock config a"
            f" {type(wanted).__name__} that cuts text otherwise; nothing was written; export to hf, and report it"
        )
    return [f"AutoTokenizer finds its {type(found).__name__}"]


@torch.no_grad()
def _answers(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    handle: UpcycleMethod,
    ffns: list[tuple[Tensor, Tensor]] | None = None,
) -> _Answers:
    """Of the sparse model with these weights in the places of its own.

    Args:
        handle: the one that watches the batch.
        ffns: another model's; its FFNs are given the same inputs.
    """
    ids_BT = probe(model.get_input_embeddings().weight.shape[0], model.device)  # type: ignore[union-attr]
    own: UpcycleMethod = model._fallow  # type: ignore[assignment]

    def call(**kwargs: Any) -> Any:
        return functional_call(model, weights, kwargs=kwargs | {"use_cache": False})

    own.set_mode("sparse")  # what layers derived from other weights is dropped, before and after
    try:
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        with own.watched.passing(sparse=True, observer=lambda _, x_TD: inputs.append(x_TD)):
            for layer in own.layers:
                layer.heard = outputs.append
            if ffns is None:
                call(input_ids=ids_BT[:1, :MOST_TOKENS])
            else:
                for layer, (x_TD, _) in zip(own.layers, ffns, strict=True):
                    layer.forward(x_TD)
        batch = None if handle.watched.batch is None else call(**handle.watched.batch)
        watched = None if batch is None else (float(batch.loss), batch.logits.argmax(-1))
        del batch
        pairs = [(x, y.view(x.shape)) for x, y in zip(inputs, outputs, strict=True)]
        return _Answers(call(input_ids=ids_BT).logits.float(), pairs, watched)
    finally:
        own.set_mode("sparse")


def _same_decoding(wanted: _Answers, found: _Answers) -> str:
    """Words for `verified`, or CheckpointError where an FFN decodes otherwise."""
    errors = [
        float((y - z).abs().mean() / y.abs().mean().clamp_min(1e-30))
        for (_, y), (_, z) in zip(wanted.ffns, found.ffns, strict=True)
    ]
    if not max(errors) <= DECODING:
        raise CheckpointError(
            f"export: loaded again, layer {errors.index(max(errors))} decodes otherwise than the model's:"
            f" outputs differ by {max(errors):.1%}, allowed is {DECODING:.0%}; nothing was written"
        )
    return (
        f"decoding, which reads living rows only: outputs of {len(errors)} FFNs within {max(errors):.1e} of the model's"
    )


def _price(before: _Answers, after: _Answers) -> str:
    """What int8 cost, in words."""
    if before.watched is None or after.watched is None:
        words = agreement(before.logits_BTV, after.logits_BTV).words()
        return f"int8 against the weights before rounding, no text being watched: {words} (random ones)"
    (loss, top_BT), (rounded_loss, rounded_top_BT) = before.watched, after.watched
    same = float((top_BT == rounded_top_BT).float().mean())
    return (
        f"int8 against the weights before rounding: loss {rounded_loss:.4f}, {rounded_loss - loss:+.4f} nats, the same"
        f" likeliest token {same:.1%} of the time, on the {top_BT.numel()} tokens that training watched"
    )
