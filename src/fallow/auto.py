"""What `import fallow` adds to transformers: its Auto classes load the folders that `fallow export --to fallow` writes.

Registration needs transformers' modules of Auto classes, and to import them here would cost every `import fallow` the
seconds that torch takes. So those that are there already are told at once, and the others as soon as they come: a
finder on `sys.meta_path` has them loaded as always and registers when their code has run. The alternatives: a loading
function of our own, which lm-eval, pipelines and trainers do not call; `trust_remote_code`, which runs code out of the
folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from fallow.exporting.upcycle_config import UpcycleConfig

    AutoConfig.register(UpcycleConfig.model_type, UpcycleConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from fallow.exporting.upcycle_config import UpcycleConfig, UpcycledForCausalLM

    AutoModelForCausalLM.register(UpcycleConfig, UpcycledForCausalLM, exist_ok=True)  # type: ignore[arg-type]


_AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}
"""What is done once a module has been imported."""


class _Finder(MetaPathFinder):
    """Finds nothing of its own: asks the other finders, and adds to the loading of what they find."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _AFTER:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _AFTER[fullname]()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def tell_transformers() -> None:
    """Register now what can be registered now, and the rest when its module is imported."""
    if any(name not in sys.modules for name in _AFTER):
        sys.meta_path.insert(0, _Finder())
    for name, register in _AFTER.items():
        if name in sys.modules:
            register()
