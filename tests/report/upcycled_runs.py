"""Runs of a tiny model that was really upcycled, for the report's tests of what such a run says of itself."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from report_folders import write_compare, write_run
from switching_runs import edit_run

from fallow import sparsify
from fallow.methods.upcycle import Upcycle
from tiny_models import tiny_batch, tiny_model

UPCYCLE_STEPS = 40
UPCYCLE = Upcycle(bank=16, keep=(4, 4, 8), predictor="bilinear", rank=8, distill=0.5, fit_tokens=600, monitor_every=0.2)
BEFORE, LEFT_OUT = 0.3, 0.08
"""Nats by which the written runs' loss computed sparse exceeds the dense one, at the start and at the end."""


@cache
def upcycled_insight() -> str:
    """What a tiny model says of itself that had a first stage and 40 steps, as JSON; it looks at every eighth."""
    torch.manual_seed(0)
    method = sparsify(tiny_model("llama", num_hidden_layers=3), UPCYCLE)
    optimizer = method.optimizer(lr=1e-3)
    method.watch(tiny_batch(seed=1, batch=4, tokens=16))
    list(method.prepare(tiny_batch(seed=seed, batch=3, tokens=20) for seed in count(10)))
    method.set_mode("sparse")
    method.model.train()
    batch = tiny_batch(batch=3, tokens=16)
    for step in range(UPCYCLE_STEPS):
        method.before_step(step, UPCYCLE_STEPS)
        method.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step, UPCYCLE_STEPS)
    return json.dumps(method.insight())


def upcycled_run(folder: Path, *, penalty: float = 0.02, seed: int = 0, **changes: Any) -> Path:
    """A run with a real insight, of 3 layers; its loss with all channels is dense's plus `penalty`, sparse LEFT_OUT
    more. `changes` are the config's."""
    config = {"name": "upcycle"} | dataclasses.asdict(dataclasses.replace(UPCYCLE, **changes))
    write_run(folder, arm=folder.name, method=config, rate=300.0, penalty=penalty, seed=seed, steps=UPCYCLE_STEPS)
    insight, info = json.loads(upcycled_insight()), json.loads((folder / "run.json").read_text())
    insight["keep"] = config["keep"]
    model = info["model"] | {"layers": 3, "d_model": 32, "ffn": 64, "parameters": 30_000}
    edit_run(folder, insight=insight, model=model)
    lines = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        kept = {k: v for k, v in line.items() if not k.startswith("omit")}
        if line["kind"] == "eval":
            share = line["step"] / UPCYCLE_STEPS
            kept["sparse_loss"] = line["loss"] + BEFORE + (LEFT_OUT - BEFORE) * share
        if line["kind"] == "layers":
            kept |= {name: insight["looks"][-1][name] for name in ("recall", "entropy", "dead")}
        lines.append(kept)
    ends = {when: {k: line[k] for k in ("loss", "sparse_loss")} for when, line in _ends(lines)}
    edit_run(folder, eval=ends)
    lines = [{"kind": "prepare"} | record for record in insight["fits"]] + lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _ends(lines: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    evals = [line for line in lines if line["kind"] == "eval"]
    return [("before", evals[0]), ("after", evals[-1])]


def upcycled(parent: Path) -> Path:
    """Dense beside an upcycled run and a control by chance."""
    folder = parent / "upcycled"
    write_run(folder / "dense", arm="dense", steps=UPCYCLE_STEPS)
    shape = json.loads((folder / "dense" / "run.json").read_text())["model"]
    edit_run(folder / "dense", model=shape | {"layers": 3, "d_model": 32, "ffn": 64, "parameters": 30_000})
    upcycled_run(folder / "upcycle")
    upcycled_run(folder / "random", penalty=0.4, selection="random")
    return write_compare(folder, ["dense", "upcycle", "random"])
