"""`sparsify(model, config)`: the one call that makes a model sparse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fallow.methods  # noqa: F401  joins every method to its config
from fallow.errors import ConfigError
from fallow.method import Method, method_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sparsify(model: PreTrainedModel, config: object) -> Method:
    """Make `model` sparse in place, as `config` says, and return the handle.

    Args:
        model: any Hugging Face causal language model whose family `fallow.anatomy` knows.
        config: an instance of `fallow.SAT` (or of another method's config class).

    Raises:
        ConfigError: `config` is not a method config, or the model is sparse already.
        UnsupportedModelError: the family is unknown; the message lists what was looked for.
    """
    method_class = method_for(config)
    if getattr(model, "_fallow", None) is not None:
        raise ConfigError("this model is sparse already; call remove() on its handle first")
    handle = method_class(model, config)
    model._fallow = handle  # type: ignore[assignment]
    return handle
