"""Runs of a tiny model that really trained with SSD, for the report's tests of what such a run says of itself."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from report_folders import write_compare, write_run

from fallow import sparsify
from fallow.methods.ssd import SSD
from tiny_models import tiny_batch, tiny_model

SWITCHING_STEPS = 60
SWITCHING = SSD(
    experts=8, active=2, dense_start=0.2, monitor_every=0.05, similarity=0.2, zeros=0.3, patience=1, sparse_share=0.2,
    dense_share=0.1, max_gap=3.0,
)  # fmt: skip


@cache
def switching_insight(schedule: str = "adaptive") -> str:
    """What a tiny model that trained with SSD for 60 steps says of itself, as JSON; it observes every third step."""
    torch.manual_seed(0)
    config = dataclasses.replace(SWITCHING, schedule=schedule)
    method = sparsify(tiny_model("llama", hidden_act="relu", num_hidden_layers=3), config)
    optimizer = method.optimizer(lr=1e-3)
    batch = tiny_batch(batch=4, tokens=24)
    method.watch(tiny_batch(seed=1, batch=4, tokens=32))
    for step in range(SWITCHING_STEPS):
        method.before_step(step, SWITCHING_STEPS)
        method.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step, SWITCHING_STEPS)
    return json.dumps(method.insight())


def switching(parent: Path, schedule: str = "adaptive") -> Path:
    """Dense beside an SSD run that holds a real insight and its loss computed both ways."""
    folder = parent / "switching"
    config = {"name": "ssd"} | dataclasses.asdict(dataclasses.replace(SWITCHING, schedule=schedule))
    write_run(folder / "dense", arm="dense", steps=SWITCHING_STEPS)
    write_run(folder / "ssd", arm="ssd", method=config, rate=500.0, penalty=0.01, steps=SWITCHING_STEPS)
    info = json.loads((folder / "ssd" / "run.json").read_text())
    info["eval"]["after"]["sparse_loss"] = info["eval"]["after"]["loss"] + 0.0123
    insight = json.loads(switching_insight(schedule))
    edit_run(folder / "ssd", insight=insight, eval=info["eval"])
    _log_layers(
        folder / "ssd" / "metrics.jsonl",
        {o["step"]: {k: o[k] for k in ("zeros", "dead")} for o in insight["observations"]},
    )
    return write_compare(folder, ["dense", "ssd"])


def _log_layers(source: Path, measured: dict[int, dict[str, Any]]) -> None:
    """Lines per layer as this method logs them: nothing omitted, the last observation's measures."""
    lines = []
    for line in map(json.loads, source.read_text().splitlines()):
        kept = {k: v for k, v in line.items() if not k.startswith("omit")}
        if line["kind"] == "layers" and measured:
            kept |= measured[max(step for step in measured if step < line["step"])]
        lines.append(json.dumps(kept) + "\n")
    source.write_text("".join(lines))


def edit_run(folder: Path, **changes: Any) -> None:
    """Replace entries of a run.json."""
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | changes), encoding="utf-8")
