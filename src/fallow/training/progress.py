"""What the user sees while a run goes: a live line in a terminal, plain lines elsewhere.

Logs and CI cannot redraw a line, so there each logged step is one line of text. With `--json` everything goes to
stderr and stdout stays for the one JSON object.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Prints lines, and the progress of one run at a time."""

    def __init__(self, *, to_stderr: bool = False, silent: bool = False) -> None:
        self._console = Console(
            file=sys.stderr if to_stderr else sys.stdout, highlight=False, markup=False, soft_wrap=True, quiet=silent
        )
        self._progress: Progress | None = None
        self._total = self._first = 0
        self._began = 0.0

    def say(self, line: str) -> None:
        """Print one line."""
        self._console.print(line)

    def start(self, total: int, done: int) -> None:
        """Begin a run of `total` steps, `done` of which were taken before."""
        self._total, self._first, self._began = total, done, time.perf_counter()
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
            live = Progress(*columns, TimeRemainingColumn(compact=True), console=self._console, transient=True)
            live.add_task("starting", total=total, completed=done)
            live.start()
            self._progress = live

    def step(self, done: int) -> None:
        """A step is complete."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done)

    def logged(
        self, done: int, *, loss: float, tokens_per_second: float, measures: Mapping[str, float], memory_mb: float
    ) -> None:
        """A step was logged: show its numbers, and the first of the method's `measures` (omit_ffn as `omit`)."""
        first = "".join(f"{name.split('_')[0]} {value:.2f}  " for name, value in list(measures.items())[:1])
        numbers = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {first}{memory_mb / 1024:.1f} GiB"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=numbers)
            return
        left = (time.perf_counter() - self._began) / max(1, done - self._first) * (self._total - done)
        self.say(f"step {done}/{self._total}  {numbers}  {_clock(left)} left")

    def stop(self) -> None:
        """The run is over, or failed."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
