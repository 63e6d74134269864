"""fallow: sparse training for language models, measured."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fallow.errors import FallowError as FallowError
    from fallow.handle import sparsify as sparsify
    from fallow.methods.sat import SAT as SAT
    from fallow.training.callback import SparsityCallback as SparsityCallback

__version__ = "0.1.0"

_HOMES = {
    "FallowError": "fallow.errors",
    "SAT": "fallow.methods.sat",
    "SparsityCallback": "fallow.training.callback",
    "sparsify": "fallow.handle",
}

__all__ = ["SAT", "FallowError", "SparsityCallback", "__version__", "sparsify"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fallow' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
