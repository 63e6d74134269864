"""A folder that appears whole or not at all, and never costs the one it replaces.

It is filled under a hidden name beside its place, flushed, and renamed. A folder cannot be renamed over another that
holds files, so the old one is first moved aside; a process killed between the two renames leaves it there, and the
next export of that name puts it back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fallow.errors import CheckpointError, ConfigError

_MARKS = ("config.json", "model-*.gguf")


@contextmanager
def replaced(target: Path, *, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Yield (the resolved target, an empty folder to fill), which becomes the target when the block ends well.

    Raises:
        ConfigError: the target is a file, holds files and `overwrite` is off, or holds something else than a model.
        CheckpointError: the disk refuses.
    """
    target = target.expanduser().resolve()
    partial, old = target.with_name(f".partial-{target.name}"), target.with_name(f".replaced-{target.name}")
    try:
        _recover(target, old)
        _may_replace(target, overwrite)
        shutil.rmtree(partial, ignore_errors=True)  # what a killed export left
        partial.mkdir(parents=True)
        yield target, partial
        _flush(partial)
        try:
            if target.exists():
                target.rename(old)
            partial.rename(target)
        except BaseException:
            _recover(target, old)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"export to {target} could not be written ({reason}); free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _recover(target: Path, old: Path) -> None:
    """After a kill between the two renames: the old folder goes back. After a later one: it is of no use."""
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def _may_replace(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"export: {target} is a file; choose a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"export: {target} holds files already; choose another folder, or overwrite it")
    if not any(
        any(target.glob(mark)) for mark in _MARKS
    ):  # overwriting removes the whole folder, so it must be a model's own
        raise ConfigError(f"export: {target} has no {_MARKS[0]}, so it is no earlier export; choose another folder")


def _flush(folder: Path) -> None:
    """Bring every file to the disk, so that the rename does not outlive the content."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
