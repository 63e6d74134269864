"""The cache folder (tokenised data, dequantised models), and the one way files are written into it.

`FALLOW_CACHE` names it; otherwise `$XDG_CACHE_HOME/fallow` or `~/.cache/fallow`. Every entry is keyed by a digest of
what it was made from, written under a temporary name and renamed, so that a killed run never leaves a half entry that
looks whole. Deleting the folder costs time, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fallow.errors import CheckpointError


def cache_folder(part: str) -> Path:
    """The folder for one kind of entry (`data`, `models`), made if need be. Raises CheckpointError if it cannot be."""
    base = os.environ.get("FALLOW_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fallow"
    folder = root / part
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cache folder {folder} cannot be made ({error.strerror}); set FALLOW_CACHE to a folder you may write to"
        ) from None
    return folder


def digest_of(*parts: object) -> str:
    """20 hex digits that depend on every part (anything JSON can hold)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def write_atomically(target: Path, content: bytes) -> None:
    """Write a file so that `target` is either the old one or the whole new one."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def build_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built once: `build(temporary)` fills a temporary folder beside it that is then renamed."""
    if target.exists():
        return target
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        build(temporary)
        temporary.rename(target)
    except OSError as error:
        if target.exists():  # another process built the same entry meanwhile
            return target
        raise CheckpointError(
            f"cache entry {target} could not be written ({error.strerror}); free some space"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
