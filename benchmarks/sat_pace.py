"""What one optimizer step of every arm of an experiment costs, all arms interleaved in one process.

    python benchmarks/sat_pace.py cpt                  # writes runs/experiments/sat-cpt/pace.json

The arms of an experiment run one after the other, for minutes each, on machines that drift by a quarter in that time:
their wall clock compares machines as much as methods. Here one model and one optimizer serve all forms in turn, on the
recipe's own batches and with a learning rate of 0, so that every form meets the same weights at the same moment. A turn
is as many steps as the widest `refresh_every`, so that each form pays for choosing as often as it does in a run.
A lazy form has an optimizer state of its own, because its clocks would slow the others' steps. `--arms` adds to what an
earlier call has measured; each ratio is against the dense of its own call. `sat_experiments.py collate` then gives
every run, besides its own clock, its seconds at this pace.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sat_experiments as experiments
import torch

import fallow
from fallow import machine
from fallow.bench.harness import Timing
from fallow.errors import FallowError
from fallow.ops import attention
from fallow.ops.cross_entropy import causal_lm_loss
from fallow.optim import adamw_for
from fallow.training import data, models, precision
from fallow.training.cache import write_atomically
from fallow.training.compare import resolve_arms
from fallow.training.quiet import quiet
from fallow.training.recipe import Recipe
from fallow.training.settings import load_file
from fallow.training.trainer import RowOrder, collate

FAR = 1 << 30
"""Total steps told to the method: its ladder stays at the top, the rate that most of a run has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=[*experiments.EXPERIMENTS])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--arms", nargs="+", help="these arms beside dense (default: all)")
    parser.add_argument("--data", default=os.environ.get("FALLOW_DATA"))
    parser.add_argument("--output", default=os.path.relpath(experiments.ROOT / "runs" / "experiments"))
    options = parser.parse_args(argv)
    try:
        quiet()
        path = run(options)
    except FallowError as error:
        print(f"sat_pace: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}; `python benchmarks/sat_experiments.py collate` takes it up")
    return 0


def run(options: argparse.Namespace) -> Path:
    """Time the forms and write pace.json; returns its path."""
    name = experiments.EXPERIMENTS[options.what]
    recipe = load_file(experiments.RECIPES / f"{name}.yaml")
    arms: dict[str, Recipe] = {}
    for file in experiments.one_at_a_time(recipe, 0, options.arms, options.data, backwards=False):
        for arm, settings in resolve_arms(file, {"output": options.output}).items():
            if settings.method != "none" or arm == "dense-s0":  # dense runs of any length take one step
                arms[arm.removesuffix("-s0")] = settings
    timing, turn = measure(arms, rounds=options.rounds)
    forms = {
        arm: {
            "ms_per_step": 1e3 * timing.median(arm) / turn,
            "ratio": timing.ratio("dense", arm),
            "quartiles": timing.spread("dense", arm),
        }
        for arm in arms
    }
    for arm, found in forms.items():
        print(f"{arm:<16} {found['ms_per_step']:8.0f} ms a step  {found['ratio']:.3f}× dense")
    path = Path(options.output) / name / "pace.json"
    earlier = json.loads(path.read_text())["forms"] if options.arms and path.exists() else {}
    forms = {arm: found | {"rounds": options.rounds} for arm, found in forms.items()}
    result = {
        "steps_per_turn": turn,
        "machine": machine.describe(),
        "forms": forms | earlier | _asked(forms, options.arms),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    return path


def _asked(forms: dict[str, Any], arms: Sequence[str] | None) -> dict[str, Any]:
    """What replaces an earlier measurement: the arms asked for, not the dense they were measured beside."""
    return {arm: found for arm, found in forms.items() if arms and arm in arms}


def measure(arms: dict[str, Recipe], *, rounds: int) -> tuple[Timing, int]:
    """(seconds of each turn per arm, steps of a turn); installing and removing a form is not timed."""
    recipe = arms["dense"]
    chosen = precision.choose(torch.device("cpu"), recipe.precision)
    model, tokenizer = models.load(recipe.model, recipe.gguf_file, chosen.dtype)
    rows = data.prepare(recipe, tokenizer, models.describe(model, recipe.model)["vocab"]).train
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    attention.enable(model)
    model.train()
    configs = {arm: settings.method_config() for arm, settings in arms.items()}
    turn = max((getattr(c, "refresh_every", 1) for c in configs.values() if c is not None), default=1)
    order = list(RowOrder(rows=len(rows), count=turn * recipe.batch_size, seed=recipe.seed))  # type: ignore[arg-type]
    per = recipe.batch_size
    batches = [collate([rows[i] for i in order[s * per : (s + 1) * per]]) for s in range(turn)]
    optimizer = adamw_for(model, lr=0.0, weight_decay=recipe.weight_decay, betas=recipe.betas)
    parameters = [p for p in model.parameters() if p.requires_grad]
    lazy_state: dict[Any, Any] = {}
    timing = Timing({arm: [] for arm in arms})
    names = list(arms)
    for i in range(rounds + 1):
        for arm in names if i % 2 == 0 else reversed(names):
            config = configs[arm]
            handle: Any = fallow.sparsify(model, config) if config is not None else None
            used = optimizer
            if getattr(config, "lazy", False):
                used = handle.optimizer(lr=0.0, weight_decay=recipe.weight_decay, betas=recipe.betas)
                used.state.update(lazy_state)

            def before(step: int, handle: Any = handle) -> None:
                if handle is not None:
                    handle.before_step(step, FAR)

            seconds = _turn(model, batches, used, parameters, recipe.clip, before)
            if used is not optimizer:
                lazy_state = dict(used.state)
            if handle is not None:
                handle.remove()
            if i > 0:
                timing.seconds[arm].append(seconds)
    return timing, turn


def _turn(
    model: Any,
    batches: list[dict[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    clip: float,
    before: Callable[[int], None],
) -> float:
    began = time.perf_counter()
    for step, batch in enumerate(batches):
        before(step)
        model(**batch).loss.backward()
        if clip > 0:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


if __name__ == "__main__":
    raise SystemExit(main())
