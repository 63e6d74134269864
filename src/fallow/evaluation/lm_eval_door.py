"""The one door to lm-eval, an optional package: is it there, is it a version we know, and how it comes in quietly.

Its RULER module downloads a sentence splitter when it is imported, which only essay haystacks use, and those are not
among the offline tasks. lm-eval lets rank 0 alone download, so it is imported as if on another rank: without this, an
import offline waits for the network and prints its failure.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import os
import random
from collections.abc import Iterator
from types import ModuleType

from packaging.version import Version

from fallow.errors import ConfigError

OLDEST, NEWEST = "0.4.13", "0.5"
"""Versions whose RULER generators and task objects are known: from the one, below the other."""
MEND = "pip install 'fallow[eval]'"


def check() -> None:
    """Raises ConfigError where lm-eval is missing, of another version, or without what RULER needs."""
    try:
        found = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"RULER and lm-eval's tasks need lm-eval, which is not installed; {MEND}") from None
    if not Version(OLDEST) <= Version(found) < Version(NEWEST):
        raise ConfigError(f"lm-eval {found} is installed, {OLDEST} to below {NEWEST} is needed; {MEND}")
    for package in ("wonderwords", "nltk"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"RULER needs {package} beside lm-eval, which is not installed; {MEND}") from None


def module(name: str) -> ModuleType:
    """`lm_eval.NAME`, imported without network and without print. Raises ConfigError as `check` does."""
    check()
    with silence():
        before, state = os.environ.get("LOCAL_RANK"), random.getstate()
        os.environ["LOCAL_RANK"] = before or "1"
        try:
            return importlib.import_module(f"lm_eval.{name}")
        except ImportError as error:
            raise ConfigError(f"lm-eval cannot be imported ({' '.join(str(error).split())[:160]}); {MEND}") from None
        finally:
            random.setstate(state)  # something that nltk imports draws from it
            if before is None:
                del os.environ["LOCAL_RANK"]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """lm-eval prints progress from everywhere; warnings and errors of its loggers stay."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
