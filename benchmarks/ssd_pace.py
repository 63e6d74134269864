"""What the steps of SSD's experiments cost: dense, sparse, MoE and small, side by side in one process.

    python benchmarks/ssd_pace.py            # benchmarks/results/ssd-pace.json

Runs one after another compare the machine's drift as much as the arms. Here every form takes one step in turn, in
alternating order; observations (one pass, and two once there are experts) and a partition are timed apart. A run's
seconds are then its dense and sparse steps, its observations and its partitions at these prices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any

import ssd_experiments as experiments
import torch
from scratch_runs import batches, optimizer_of
from ssd_arms import ACTIVE, ARMS, EXPERTS, PREFIX, SSD_SETTINGS, Arm

from fallow import machine
from fallow.bench.harness import interleave
from fallow.training.settings import load_file, resolve

RESULT = experiments.ROOT / "benchmarks" / "results" / "ssd-pace.json"
LONG = 1 << 30
FORMS = {
    "dense": "dense",
    "sparse": "always-sparse",
    "sparse-half": "ssd-half",
    "sparse-eight": "ssd-eight",
    "moe": "moe",
    "small": "small",
    "deep-dense": "deep-dense",
    "deep-sparse": "deep-ssd",
    "deep-sparse-half": "deep-ssd-half",
    "deep-sparse-eight": "deep-ssd-eight",
    "deep-small": "deep-small",
    "broad-dense": "broad-dense",
    "broad-sparse-eight": "broad-fixed-eight",
    "large-dense": "large-dense",
    "large-sparse": "large-fixed-120",
}
"""What is timed, and the arm whose steps it is."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="as in the runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="only these; with dense of the same model"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    os.chdir(experiments.ROOT)
    steps, looks = {}, {}
    for form in options.forms:
        arm = ARMS[FORMS[form]]
        if arm.ssd is not None:
            arm = dataclasses.replace(arm, ssd=arm.ssd | {"schedule": "always_sparse", "monitor_every": LONG})
        steps[form], handle = stepper(arm)
        if handle is not None:
            prefix = PREFIX[arm.model]
            if form in ("sparse", "deep-sparse", "broad-sparse-eight", "large-sparse"):
                looks |= {f"{prefix}observation": looker(handle), f"{prefix}partition": partitioner(handle)}
    timing = interleave(steps, rounds=options.rounds, warm_up=2)
    apart = interleave(looks, rounds=5, warm_up=1)
    prices = {n: 1e3 * t.median(n) for t in (timing, apart) for n in t.seconds}
    rows = [
        {
            "form": form,
            "step_ms": prices[form],
            "of_dense": 1 / timing.ratio(base, form),
            "quartiles": timing.spread(form, base),
            "rounds": options.rounds,
        }
        for form in steps
        for base in (f"{PREFIX[ARMS[FORMS[form]].model]}dense",)
    ]
    result: dict[str, Any] = {"experiment": "ssd-pace", "command": "python benchmarks/ssd_pace.py"}
    result |= {"machine": machine.describe(), "threads": options.threads, "rounds": options.rounds}
    result |= {"experts": EXPERTS, "active": ACTIVE, "prices_ms": prices, "rows": rows, "settings": SSD_SETTINGS}
    keep_others(result, options.output)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['form']:<14} {row['step_ms']:8.1f} ms  {row['of_dense']:.3f} of dense")
    for name in looks:
        print(f"{name:<18} {prices[name]:8.1f} ms")
    return 0


def keep_others(result: dict[str, Any], file: Path) -> None:
    """Forms that the file has and that were not timed now stay in it: a form is compared with dense of its own model,
    which is timed beside it."""
    if not file.exists():
        return
    old = json.loads(file.read_text())
    result["prices_ms"] = old["prices_ms"] | result["prices_ms"]
    timed = {row["form"] for row in result["rows"]}
    result["rows"] = [row for row in old["rows"] if row["form"] not in timed] + result["rows"]


def stepper(arm: Arm) -> tuple[Callable[[], None], Any]:
    """One training step of an arm per call, and its handle."""
    recipe = resolve(load_file(experiments.RECIPE), {})
    recipe, start, text, handle = experiments.begin(recipe, arm, seed=0)
    model = start.model
    optimizer = optimizer_of(model, handle, recipe)
    stream = cycle(list(batches(text.train, dataclasses.replace(recipe, steps=8))))
    numbers = count()

    def step() -> None:
        number = next(numbers)
        if handle is not None:
            handle.before_step(number, LONG)
        model(**next(stream), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step, handle


def looker(handle: Any) -> Callable[[], None]:
    return lambda: handle.observe(0)


def partitioner(handle: Any) -> Callable[[], None]:
    return lambda: handle.partition(0)


if __name__ == "__main__":
    sys.exit(main())
