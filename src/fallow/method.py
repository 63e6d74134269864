"""The contract every method keeps, and the registry that maps a config class to its method (design: "Methods").

A trainer needs nothing but this file. A new method is one subclass of `Method` and one `register(...)` line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fallow.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Mode = Literal["dense", "sparse"]


class Method(ABC):
    """A model made sparse in place, and the handle on it. Built by `fallow.sparsify`, undone by `remove()`."""

    name: ClassVar[str]
    two_modes: ClassVar[bool] = False
    """Whether the trained weights may be served sparse: held-out loss is then taken in both modes, and the method's
    state is kept beside the trained model."""
    sparse_from_start: ClassVar[bool] = False
    """Whether that holds before training too."""

    def __init__(self, model: PreTrainedModel, config: Any) -> None:
        self.model = model
        self.config = config
        self.mode: Mode = "sparse"

    @abstractmethod
    def before_step(self, step: int, total_steps: int) -> None:
        """Call before the first micro-batch of optimizer step `step` (0-based) of `total_steps`."""

    @abstractmethod
    def after_step(self, step: int, total_steps: int) -> None:
        """Call after `optimizer.step()` of step `step`."""

    @abstractmethod
    def optimizer(
        self, *, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> torch.optim.Optimizer:
        """The optimizer the method wants, with AdamW semantics. No decay on biases and norms (1-D parameters)."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Numbers for loggers, keyed `"<method>/<what>"`."""

    def layer_metrics(self) -> dict[str, list[float]]:
        """Numbers per layer, in layer order, keyed by what they are (e.g. `omit_ffn`)."""
        return {}

    def memory(self) -> dict[str, Any]:
        """Bytes of model state on this rank, where the method changes them: `sparse` by kind, `sparse_total`,
        `sparse_dense` (the same layers under dense AdamW), `ratio`, `predicted` by kind, `rest`, `scratch`. Empty where
        it does not. Call it between `backward` and `zero_grad`: gradients are counted only while they exist."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond weights and optimizer: tensors and plain scalars only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`. Raises CheckpointError when it is of another model or config."""

    @abstractmethod
    def set_mode(self, mode: Mode) -> None:
        """`"dense"`: every neuron computed. `"sparse"`: as trained. Same weights."""

    @contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        """`set_mode(mode)` for a block of code, and afterwards as before."""
        before = self.mode
        self.set_mode(mode)
        try:
            yield
        finally:
            self.set_mode(before)

    def watch(self, batch: dict[str, torch.Tensor]) -> None:  # noqa: B027  most methods look at no batch of their own
        """A fixed held-out batch (what the model takes, labels included) that the method may run when it likes."""

    def prepare(self, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
        """What the method trains by itself before the run, on as many of these batches as it asks for; yields records
        of its progress, as JSON holds them. Not called when a run resumes: it is in the state."""
        return iter(())

    def advice(self, tokens: int) -> list[str]:
        """One line each, before training on `tokens` a step: what of the config will not pay here, with the number."""
        return []

    def insight(self) -> dict[str, Any]:
        """What the method saw and decided so far, as JSON holds it, for the report's page; empty: nothing to tell."""
        return {}

    @abstractmethod
    def remove(self) -> PreTrainedModel:
        """Undo every change to the module tree and return the stock model with the weights as trained."""


_METHODS: dict[type, type[Method]] = {}


def register(config_class: type, method_class: type[Method]) -> None:
    """Join a config class to its method. Raises ConfigError on a second, different registration."""
    if _METHODS.get(config_class, method_class) is not method_class:
        raise ConfigError(f"{config_class.__name__} is registered already, to {_METHODS[config_class].__name__}")
    _METHODS[config_class] = method_class


def method_for(config: object) -> type[Method]:
    """The method class of a config instance. Raises ConfigError naming the known ones."""
    try:
        return _METHODS[type(config)]
    except KeyError:
        known = ", ".join(sorted(c.__name__ for c in _METHODS)) or "none"
        raise ConfigError(f"no method for a config of type {type(config).__name__}; known: {known}") from None


def method_names() -> dict[str, type]:
    """`{"sat": SAT, …}`: what a recipe's `method:` may say."""
    return {m.name: c for c, m in _METHODS.items()}
