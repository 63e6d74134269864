"""Checkpoints that are whole or not there, and the search for the newest whole one.

A checkpoint is filled in a folder with a temporary name beside its final place, every file is flushed to the disk, a
manifest of sizes and sha256 digests is added, and only then is the folder renamed. So a killed process, a full disk
or a pulled plug leaves the earlier checkpoint as it was. Checking sizes alone would miss a block that reads back as
zeros; hashing 2 GB takes about two seconds, once per save and once per resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from fallow.errors import CheckpointError

MANIFEST = "fallow-manifest.json"
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)")


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return folder / f"checkpoint-{step}"


def staging(folder: Path, step: int) -> Path:
    """The temporary folder that becomes `place(folder, step)`."""
    return folder / f".partial-checkpoint-{step}"


def clear(folder: Path, step: int) -> Path:
    """Make an empty staging folder, removing what killed saves left. Raises CheckpointError where it cannot be made."""
    for stale in folder.glob(".partial-checkpoint-*"):
        shutil.rmtree(stale, ignore_errors=True)
    target = staging(folder, step)
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(_advice(folder, step, error)) from None
    return target


def guarded(folder: Path, step: int, action: Callable[[], None]) -> None:
    """Run one part of a save; any failure to write becomes a CheckpointError that names the mend, and leaves no rest.

    torch and safetensors report a full disk as RuntimeError and SafetensorError, hence the three kinds.
    """
    try:
        action()
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staging(folder, step), ignore_errors=True)
        raise CheckpointError(_advice(folder, step, error)) from error


def commit(folder: Path, step: int, source: Path | None = None) -> Path:
    """Flush and seal the staged checkpoint, give it its name, and remove all but the newest `KEPT`.

    Args:
        folder: holds the checkpoints.
        step: optimizer steps taken.
        source: the filled folder; the staging folder unless given.
    """
    source = source or staging(folder, step)
    files = sorted(p for p in source.rglob("*") if p.is_file())
    entries = {str(p.relative_to(source)): [p.stat().st_size, _flushed_digest(p)] for p in files}
    manifest = source / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": entries}, indent=1))
    _flush(manifest)
    _flush(source)
    target = place(folder, step)
    if target.exists():  # what is there was found damaged, or this step would not be saved anew
        shutil.rmtree(target)
    source.rename(target)
    _flush(folder)
    shutil.rmtree(staging(folder, step), ignore_errors=True)
    for old in _by_step(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        entries = manifest["files"].items()
    except FileNotFoundError:
        return "its manifest is missing, so it was never completed"
    except (OSError, ValueError, KeyError, AttributeError):
        return "its manifest cannot be read"
    for name, (size, digest) in entries:
        path = checkpoint / name
        try:
            actual = path.stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def newest_valid(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, None where no checkpoint was ever saved; `say` is told of each one passed over.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    found = _by_step(folder)
    for checkpoint in found:
        why = problem(checkpoint)
        if why is None:
            return checkpoint
        say(f"{checkpoint} is damaged ({why}); trying the one before it")
    if found:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole; restore one from a backup, or start anew with --overwrite"
        )
    return None


def step_of(checkpoint: Path) -> int:
    """Optimizer steps taken when it was written."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


def _by_step(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def _flushed_digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _advice(folder: Path, step: int, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
    newest = next((p.name for p in _by_step(folder) if problem(p) is None), None) if folder.is_dir() else None
    kept = f"{newest} stays valid" if newest else "there is none before it"
    return (
        f"checkpoint of step {step} could not be written to {folder} ({reason}); {kept}; free some space or choose"
        " another output, then run the same command to resume"
    )
