"""Runs a test file once more in a child process under Triton's interpreter.

Triton fixes "interpreter or compiler" when it is first imported, so a process that has imported it cannot switch.
"""

from __future__ import annotations

import os
import subprocess
import sys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process is such a child."""


def passes_interpreted(file: str, *options: str) -> None:
    """Fail unless pytest ran tests of `file` there, and all passed."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-x", "-p", "no:cacheprovider", *options],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
