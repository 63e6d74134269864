"""OUTPUT/NAME/ARM on disk: run.json, metrics.jsonl, checkpoints, the trained model, and what a second run finds there.

run.json is replaced as a whole, so that it is never half written; metrics.jsonl only grows, and a resumed run first
drops the lines of the steps it takes again.

run.json:      fallow, run, arm, status (running, finished, interrupted, failed), started, finished, command, recipe,
               method (null when dense), model, data, machine, versions, precision, backends, totals, eval, time, memory
               (`state_bytes.count` at `step`, and `files` on disk; all in bytes)
metrics.jsonl: {"kind": "train", step, tokens, seconds (of training so far), loss, lr, grad_norm, tokens_per_second,
               memory_mb, the mean of each of `Method.layer_metrics`, all of `Method.metrics`},
               {"kind": "eval", step, tokens, seconds, loss (nats, dense mode)},
               {"kind": "layers", step, one list per measure of `Method.layer_metrics`}
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fallow.errors import CheckpointError, ConfigError
from fallow.training.cache import write_atomically
from fallow.training.recipe import Recipe

# Settings that a resumed run may change: they alter neither weights nor what is measured.
_FREE = ("output", "name", "threads", "log_every", "save_every", "arms", "equal_seconds_to")


class RunFolder:
    """OUTPUT/NAME/ARM: run.json, metrics.jsonl, checkpoints/ and, at the end, model/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_file, self.metrics_file = path / "run.json", path / "metrics.jsonl"
        self.checkpoints, self.model = path / "checkpoints", path / "model"

    def make(self) -> None:
        """Create the folder. Raises CheckpointError where that is not possible."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / ".writable", b"")
            (self.path / ".writable").unlink()
        except OSError as error:
            raise CheckpointError(
                f"output folder {self.path} cannot be written ({error.strerror}); choose another with --output"
            ) from None

    def read(self) -> dict[str, Any] | None:
        """run.json, None where there is none or it cannot be read."""
        try:
            found = json.loads(self.run_file.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write(self, run: dict[str, Any]) -> None:
        """Replace run.json. Raises CheckpointError when the disk refuses."""
        try:
            write_atomically(self.run_file, (json.dumps(run, indent=1, default=str) + "\n").encode())
        except OSError as error:
            raise CheckpointError(f"{self.run_file} could not be written ({error.strerror}); free some space") from None

    def append(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl. Raises CheckpointError when the disk refuses."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.metrics_file} could not be written ({error.strerror}); free some space, then run the same"
                " command to resume"
            ) from None

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run takes again."""
        if not self.metrics_file.exists():
            return
        kept = []
        for text in self.metrics_file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(text)["step"] <= step:
                    kept.append(text)
        write_atomically(self.metrics_file, "".join(text + "\n" for text in kept).encode())


def arm_name(recipe: Recipe) -> str:
    """The arm's name of a recipe without arms: its method, or `dense`."""
    return "dense" if recipe.method == "none" else recipe.method


def folder_of(recipe: Recipe, arm: str) -> RunFolder:
    """Where an arm's run lies: OUTPUT/NAME/ARM."""
    return RunFolder(Path(recipe.output).expanduser() / recipe.name / arm)


def same_settings(recipe: Recipe, earlier: dict[str, Any], folder: RunFolder) -> None:
    """Raise ConfigError, naming what differs, when the folder holds a run that the recipe cannot continue."""
    here, there = plain(recipe), earlier.get("recipe") or {}
    changed = [k for k in here if k not in _FREE and k in there and here[k] != there[k]]
    if changed:
        what = "; ".join(f"{k}: {there[k]} there, {here[k]} now" for k in changed[:3])
        raise ConfigError(
            f"{folder.path} holds a run with other settings ({what}); choose another name, or --overwrite"
        )


def forget(folder: RunFolder) -> None:
    """Remove an earlier run's own files, and nothing else that lies in the folder."""
    for part in (folder.checkpoints, folder.model):
        shutil.rmtree(part, ignore_errors=True)
    for file in (folder.metrics_file, folder.run_file):
        file.unlink(missing_ok=True)
    folder.make()


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def file_names(names: list[str]) -> str:
    """The first two files and how many more."""
    first = ", ".join(Path(n).name for n in names[:2])
    return first + (f" and {len(names) - 2} more files" if len(names) > 2 else "")


def result_line(record: dict[str, Any]) -> str:
    """Speed, quality, time and memory of a run in one line."""
    t, e = record["totals"], record["eval"]

    def shown(part: str) -> str:
        loss = (e.get(part) or {}).get("loss")
        return "?" if loss is None else f"{loss:.4f}"

    return (
        f"{t['tokens_per_second']:,.0f} tokens/s, held-out loss {shown('before')} -> {shown('after')},"
        f" {t['train_seconds']:,.0f} s, peak memory {t['peak_memory_mb'] / 1024:.1f} GiB"
    )


def now() -> str:
    """The time of day in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
