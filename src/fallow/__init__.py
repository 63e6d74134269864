"""fallow: sparse training for language models, measured."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fallow.auto import tell_transformers

if TYPE_CHECKING:
    from fallow.errors import FallowError as FallowError
    from fallow.exporting import export as export
    from fallow.exporting.packed import load_packed as load_packed
    from fallow.handle import sparsify as sparsify
    from fallow.methods.sat import SAT as SAT
    from fallow.methods.smet import SMET as SMET
    from fallow.methods.ssd import SSD as SSD
    from fallow.methods.upcycle import Upcycle as Upcycle
    from fallow.training.callback import SparsityCallback as SparsityCallback

__version__ = "0.1.0"

_HOMES = {
    "FallowError": "fallow.errors",
    "SAT": "fallow.methods.sat",
    "SMET": "fallow.methods.smet",
    "SSD": "fallow.methods.ssd",
    "Upcycle": "fallow.methods.upcycle",
    "SparsityCallback": "fallow.training.callback",
    "export": "fallow.exporting",
    "load_packed": "fallow.exporting.packed",
    "sparsify": "fallow.handle",
}

__all__ = [
    "SAT",
    "SMET",
    "SSD",
    "FallowError",
    "SparsityCallback",
    "Upcycle",
    "__version__",
    "export",
    "load_packed",
    "sparsify",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fallow' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__


tell_transformers()
