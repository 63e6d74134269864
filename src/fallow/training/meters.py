"""What a run measures: where its seconds go, and its memory.

`train_seconds` is time inside optimizer steps (data, forward, backward, optimizer), never evaluation, checkpoints or
start-up; tokens per second leave the first step out, because it allocates. A median step would be steadier, but it
hides what a ladder's denser last steps cost. Phases are exclusive: time in an inner phase is not counted in the outer
one. Phases on a GPU are host time; only whole steps are synchronised.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

PHASES = ("forward", "backward", "optimizer", "selection", "evaluation", "checkpoint", "data", "other")
_IN_STEP = ("forward", "backward", "optimizer", "selection", "data")


class Meters:
    """Clocks and counters of one run. All times in seconds, memory in MiB."""

    def __init__(self, *, tokens_per_step: int, device: torch.device) -> None:
        self.tokens_per_step = tokens_per_step
        self.device = device
        self.steps = 0
        self.train_seconds = 0.0
        self.cpu_seconds = 0.0
        self.earlier_wall = 0.0
        self.step_seconds: list[float] = []
        self.phases: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.peak_mb = 0.0
        self._warm = False
        self._stack: list[str] = []
        self._since = time.perf_counter()
        self._started = time.perf_counter()
        self._selected = 0.0
        self._step_start: tuple[float, float] | None = None
        reset_peak_memory(device)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`, and not as the phase around it."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Start a phase; `leave()` ends it."""
        self._charge()
        self._stack.append(name)

    def leave(self) -> None:
        """End the innermost phase."""
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.phases[self._stack[-1]] += now - self._since
        self._since = now

    def step_begins(self) -> None:
        """An optimizer step starts with fetching its data."""
        self._step_start = (time.perf_counter(), time.process_time())

    def step_ends(self, selection_seconds: float = 0.0) -> None:
        """An optimizer step is complete.

        Args:
            selection_seconds: the method's own running total of time spent choosing inside the forward pass.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._step_start is None:
            return
        wall, cpu = (time.perf_counter() - self._step_start[0], time.process_time() - self._step_start[1])
        self._step_start = None
        inner = selection_seconds - self._selected
        self._selected = selection_seconds
        self.phases["selection"] += inner
        self.phases["forward"] -= inner
        self.steps += 1
        self.train_seconds += wall
        self.cpu_seconds += cpu
        if self._warm:
            self.step_seconds.append(wall)
        self._warm = True
        self.peak_mb = max(self.peak_mb, peak_memory_mb(self.device))

    @property
    def tokens(self) -> int:
        """Token positions trained on."""
        return self.steps * self.tokens_per_step

    def tokens_per_second(self, last: int | None = None) -> float:
        """Over all steps but the first, a ladder's slower last steps included; or from the median of the `last` few."""
        times = self.step_seconds[-last:] if last else self.step_seconds
        if not times:
            return self.tokens / self.train_seconds if self.train_seconds else 0.0
        return self.tokens_per_step / (statistics.median(times) if last else statistics.fmean(times))

    def totals(self) -> dict[str, float]:
        """`totals` of run.json."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "train_seconds": round(self.train_seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "wall_seconds": round(self.wall_seconds(), 3),
            "tokens_per_second": round(self.tokens_per_second(), 2),
            "peak_memory_mb": round(max(self.peak_mb, peak_memory_mb(self.device)), 1),
        }

    def wall_seconds(self) -> float:
        """Since the run began, in this process and in those it resumes."""
        return self.earlier_wall + time.perf_counter() - self._started

    def time_by_phase(self) -> dict[str, float]:
        """`time` of run.json: `other` is what of the steps no phase claims."""
        inside = sum(self.phases[name] for name in _IN_STEP)
        return {n: round(v, 3) for n, v in self.phases.items()} | {
            "other": round(max(0.0, self.train_seconds - inside), 3)
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "steps": self.steps,
            "train_seconds": self.train_seconds,
            "cpu_seconds": self.cpu_seconds,
            "wall_seconds": self.wall_seconds(),
            "step_seconds": self.step_seconds,
            "phases": self.phases,
            "peak_mb": self.peak_mb,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state()`."""
        self.steps = state["steps"]
        self.train_seconds, self.cpu_seconds = state["train_seconds"], state["cpu_seconds"]
        self.earlier_wall = state["wall_seconds"]
        self.step_seconds = list(state["step_seconds"])
        self.phases |= state["phases"]
        self.peak_mb = state["peak_mb"]


def memory_mb(device: torch.device) -> float:
    """In use now, MiB: resident memory of this process, or allocated memory of the GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def peak_memory_mb(device: torch.device) -> float:
    """Highest use since `reset_peak_memory`, MiB. Where the system keeps no high-water mark: the use now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) / 1024 if found else memory_mb(device)


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks, and hand freed memory of an earlier arm back, so that arms in one process compare."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
