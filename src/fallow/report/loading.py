"""Run folders as the trainer wrote them -> `Run` objects, forgiving about everything but an empty hand.

A run is `run.json` (what ran) beside `metrics.jsonl` (how it went). Both may be half-written: the run may still be
going, or have been killed in the middle of a line. The obvious reader stops at the first bad byte; this one keeps every
line it can read and says in a note what it could not, because an interrupted run needs its report most.
Cost: one pass over each file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fallow.errors import DataError

RUN_FILE, METRICS_FILE, COMPARE_FILE = "run.json", "metrics.jsonl", "compare.json"
_NEEDED = {"train": ("step", "tokens", "seconds", "loss"), "eval": ("step", "tokens", "seconds", "loss")}
_PLACE = {"prepare": "tokens"}
"""What orders the lines of a kind; the others are ordered by their step."""
SERVED_SPARSE = ("upcycle",)
"""Methods whose model is made to be served sparse. Its loss computed so is what the page judges and calls its loss."""


@dataclass(kw_only=True, slots=True)
class Run:
    """One training run."""

    path: Path
    """Its folder."""
    arm: str
    """Which arm of a comparison it is; the folder's name where run.json does not say."""
    info: dict[str, Any]
    """run.json as written; empty where it could not be read."""
    train: list[dict[str, Any]] = field(default_factory=list)
    """Training lines in step order, each with finite step, tokens, seconds, loss."""
    evals: list[dict[str, Any]] = field(default_factory=list)
    """Evaluation lines in step order. `loss` is as the model will be served, `dense_loss` beside it where that is
    sparse."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """Per-layer omission lines in step order."""
    prepared: list[dict[str, Any]] = field(default_factory=list)
    """Lines of a first stage before step 0, in the order of their tokens."""
    served_sparse: bool = False
    """Whether `loss` in `evals` is the loss computed sparse."""

    @property
    def status(self) -> str:
        return str(self.info.get("status") or "unknown")

    @property
    def method(self) -> str | None:
        """The method's name, None for a dense run."""
        method = self.info.get("method")
        return str(method.get("name") or "sparse") if isinstance(method, dict) else None


@dataclass(kw_only=True, slots=True)
class Loaded:
    """Every run found, and what a reader must know about how they were found."""

    runs: list[Run]
    """In the order given; arms of a comparison in the order of compare.json."""
    baseline: str | None
    """The arm compare.json names as baseline, if any does."""
    notes: list[str]
    """One line per thing that could not be read."""


def load(run_dirs: Iterable[Path]) -> Loaded:
    """Read run folders and comparison folders.

    Raises:
        DataError: no folder was given, one does not exist, or one holds no run; the message names what was looked for.
    """
    runs: list[Run] = []
    notes: list[str] = []
    baseline: str | None = None
    seen: set[Path] = set()
    folders = [Path(folder) for folder in run_dirs]
    if not folders:
        raise DataError("no run given; name one or more folders that `fallow train` or `fallow compare` wrote")
    for folder in folders:
        if folder.name in (RUN_FILE, COMPARE_FILE) and folder.is_file():
            folder = folder.parent
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; give one that `fallow train` or `fallow compare` wrote")
        found, named = _arm_folders(folder, notes)
        baseline = baseline or named
        if not found:
            raise DataError(
                f"no run found in {folder}: looked for {RUN_FILE}, {METRICS_FILE}, {COMPARE_FILE} and the same in its "
                "direct sub-folders; give a folder that `fallow train` or `fallow compare` wrote"
            )
        for path in found:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                runs.append(_load_run(path, notes))
    return Loaded(runs=runs, baseline=baseline, notes=notes)


def lookup(info: Any, *keys: str) -> Any:
    """`info[k0][k1]…`, or None where any step of the way is missing."""
    for key in keys:
        if not isinstance(info, dict):
            return None
        info = info.get(key)
    return info


def number(info: Any, *keys: str) -> float | None:
    """The finite number at `keys`, or None."""
    value = lookup(info, *keys)
    return float(value) if _finite(value) else None


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _holds_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file() or (folder / METRICS_FILE).is_file()


def _arm_folders(folder: Path, notes: list[str]) -> tuple[list[Path], str | None]:
    """The run folders in `folder` (itself, or its arms), and the baseline's name where compare.json gives one."""
    if _holds_run(folder):
        return [folder], None
    present = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and _holds_run(path)}
    compare: dict[str, Any] = {}
    if (folder / COMPARE_FILE).is_file():
        compare = _read_object(folder / COMPARE_FILE, notes)
    arms = compare.get("arms")
    order = [str(arm) for arm in arms] if isinstance(arms, list) else []
    for arm in order:
        if arm not in present:
            notes.append(f"{folder / arm}: named in {COMPARE_FILE}, but no run is there; the arm is missing below")
    chosen = [present[arm] for arm in order if arm in present]
    baseline = compare.get("baseline")
    return chosen + [path for name, path in present.items() if name not in order], baseline and str(baseline)


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError) as error:
        notes.append(f"{path}: could not be read ({error}); its part of the page is empty")
        return {}
    if isinstance(value, dict):
        return value
    notes.append(f"{path}: holds no JSON object; its part of the page is empty")
    return {}


def _load_run(path: Path, notes: list[str]) -> Run:
    info: dict[str, Any] = {}
    if (path / RUN_FILE).is_file():
        info = _read_object(path / RUN_FILE, notes)
    else:
        notes.append(f"{path / RUN_FILE}: missing; settings and totals of this run are unknown")
    run = Run(path=path, arm=str(info.get("arm") or path.resolve().name), info=info)
    if (path / METRICS_FILE).is_file():
        _load_metrics(run, notes)
    else:
        notes.append(f"{path / METRICS_FILE}: missing; this run has no curves")
    _add_end_points(run)
    _as_served(run)
    return run


def _load_metrics(run: Run, notes: list[str]) -> None:
    """Fill the run's lines. A step logged twice (killed, resumed, done again) counts once, as last written."""
    source = run.path / METRICS_FILE
    kinds: dict[str, dict[float, dict[str, Any]]] = {"train": {}, "eval": {}, "layers": {}, "prepare": {}}
    unreadable: list[int] = []
    not_finite: list[int] = []
    try:
        text = source.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{source}: could not be read ({error}); this run has no curves")
        return
    for position, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            unreadable.append(position)
            continue
        kind = entry.get("kind") if isinstance(entry, dict) else None
        place = _PLACE.get(str(kind), "step")
        if kind not in kinds or not _finite(entry.get(place)):
            unreadable.append(position)
        elif all(_finite(entry.get(key)) for key in _NEEDED.get(kind, ())):
            kinds[kind][entry[place]] = entry
        elif isinstance(entry.get("loss"), float) and not math.isfinite(entry["loss"]):
            not_finite.append(int(entry["step"]))
        else:
            unreadable.append(position)
    run.train, run.evals, run.layers, run.prepared = ([lines[at] for at in sorted(lines)] for lines in kinds.values())
    if unreadable:
        notes.append(f"{source}: {_count(unreadable, 'line')} could not be read and is left out ({_some(unreadable)})")
    if not_finite:
        notes.append(f"{source}: the loss was not a number at {_count(not_finite, 'step')} ({_some(not_finite)})")
    if not run.train and not run.evals:
        notes.append(f"{source}: no step was logged; this run has no curves")


def _count(items: list[int], word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def _some(items: list[int]) -> str:
    return ", ".join(map(str, items[:5])) + (", …" if len(items) > 5 else "")


def _add_end_points(run: Run) -> None:
    """The evaluations before and after training, where run.json has them and metrics.jsonl does not."""
    before, after = (lookup(run.info, "eval", when) for when in ("before", "after"))
    if number(before, "loss") is not None and not any(point["tokens"] == 0 for point in run.evals):
        run.evals.insert(0, {"kind": "eval", "step": 0, "tokens": 0, "seconds": 0.0} | before)
    tokens, seconds = number(run.info, "totals", "tokens"), number(run.info, "totals", "train_seconds")
    if number(after, "loss") is None or tokens is None or seconds is None:
        return
    if not any(point["tokens"] >= tokens for point in run.evals):
        step = number(run.info, "totals", "steps") or 0
        run.evals.append({"kind": "eval", "step": step, "tokens": tokens, "seconds": seconds} | after)


def _as_served(run: Run) -> None:
    """Judge a model that is made to be served sparse by its loss computed sparse, wherever the run measured it."""
    measured = [line for line in run.evals if number(line, "sparse_loss") is not None]
    if run.method in SERVED_SPARSE and measured:
        run.served_sparse = True
        run.evals = [line | {"loss": line["sparse_loss"], "dense_loss": line["loss"]} for line in measured]
