"""`export(model, path, to=...)`: the weights as trained, in a folder that others can load.

One file per target. Every target writes into a hidden folder beside `path`, loads what it wrote, compares it with the
model in hand, and only then gives the folder its name; a method's layers stay in the model. The obvious alternative,
`handle.remove()` and `save_pretrained`, ends the training and trusts the disk. Cost: a second model in memory, dense,
while it is compared. (The room is not called `export`: that module would hide the function.)
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fallow.errors import ConfigError, UnsupportedModelError
from fallow.exporting.folder import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TARGETS = {
    "hf": "a stock Hugging Face folder, dead weights as zeros",
    "packed": "the same weights without the zeros: a bitmap and the values; read with fallow.load_packed",
    "fallow": "Upcycle's model and predictors; stock transformers loads it after `import fallow`",
    "mixtral": "SSD's experts as a stock Mixtral; for Llama and Mistral",
    "granitemoe": "SSD's experts as a stock GraniteMoE; for Llama, Granite, Qwen2",
    "qwen3_moe": "SSD's experts as a stock Qwen3-MoE; for Qwen3",
    "olmoe": "SSD's experts as a stock OLMoE; where queries and keys are normalised over all heads",
    "flex_olmo": "SSD's experts as a stock FlexOlmo; for OLMo2",
    "gguf": "one file for llama.cpp, in f16; SSD's experts, or a dense model; for Llama and Mistral",
    "gguf_f32": "the same in f32",
}


Target = Literal[
    "hf", "packed", "fallow", "mixtral", "granitemoe", "qwen3_moe", "olmoe", "flex_olmo", "gguf", "gguf_f32"
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What an export wrote and how it was checked."""

    to: str
    """A key of `TARGETS`."""
    path: Path
    files: dict[str, int]
    """Bytes of each file, by its name within `path`."""
    weight_bytes: int
    """Bytes of the .safetensors or .gguf files."""
    dense_bytes: int
    """Bytes of the model's tensors when dense, shared ones counted once."""
    packed_layers: int
    """Layers stored without their zeros."""
    verified: list[str]
    """What was compared after the folder was loaded again, one sentence each."""

    @property
    def ratio(self) -> float:
        """weight_bytes / dense_bytes."""
        return self.weight_bytes / self.dense_bytes

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return dataclasses.asdict(self) | {"path": str(self.path), "ratio": self.ratio}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a target's `write(model, folder)` returns."""

    dense_bytes: int
    packed_layers: int
    verified: list[str]


def export(
    model: PreTrainedModel,
    path: str | Path,
    to: Target = "hf",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
    int8: bool = False,
) -> Exported:
    """Write `model`, stock or made sparse by fallow, to the folder `path`. The model is left as it is.

    Args:
        model: a Hugging Face causal language model, not sharded over ranks.
        path: the folder; made if need be. Nothing appears there until all of it is written and verified.
        to: "hf" for `AutoModelForCausalLM.from_pretrained`, dead weights as zeros; "fallow" for the same after `import
            fallow`, with Upcycle's predictors, see `fallow.exporting.fallow`; "packed" for `fallow.load_packed`,
            linear layers of the blocks without their zeros where that is smaller; the others write the experts of a
            model held by SSD for stock MoE engines, see `fallow.exporting.moe`.
        tokenizer: written along when given.
        overwrite: replace an earlier export at `path`.
        int8: "fallow" only: FFN weights in 8 bits with a scale per channel.

    Raises:
        ConfigError: unknown target, a model that cannot be written, or a folder that is in use.
        UnsupportedModelError: a family that `fallow.anatomy` does not know, quantised weights, or a property of the
            model that the target cannot express, named.
        CheckpointError: the disk refuses, or what was written does not load as the same model.
    """
    if to not in TARGETS:
        raise ConfigError(f"export: unknown target {to!r}; targets: {', '.join(TARGETS)}")
    if int8 and to != "fallow":
        raise ConfigError(f"export: int8 is for fallow, {to} has weights in the model's dtype; leave out int8")
    _refuse_predictors(model, to)
    target = import_module(f"fallow.exporting.{to}")
    with replaced(Path(path), overwrite=overwrite) as (place, folder):
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        written: Written = target.write(model, folder, int8=int8) if to == "fallow" else target.write(model, folder)
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return Exported(
        to=to,
        path=place,
        files=files,
        weight_bytes=sum(size for name, size in files.items() if name.endswith((".safetensors", ".gguf"))),
        dense_bytes=written.dense_bytes,
        packed_layers=written.packed_layers,
        verified=written.verified,
    )


def _refuse_predictors(model: PreTrainedModel, to: str) -> None:
    """Raises UnsupportedModelError where a stock engine would have to choose channels as Upcycle does."""
    handle = getattr(model, "_fallow", None)
    if to in ("hf", "packed", "fallow") or handle is None or handle.name != "upcycle":
        return
    dense = " or the dense companion: hf, or gguf with set_mode('dense') (--dense)"
    if not (to.startswith("gguf") and handle.mode == "dense"):
        raise UnsupportedModelError(
            f"export: {to} cannot express Upcycle's predictors, by which every token chooses its channels in each bank;"
            f" export to fallow,{dense}"
        )
