"""The section on a diagnosis: the gap by length, the map of layers against lengths, the cause, and the repair's record.

A run whose folder holds `diagnosis.json` (of `fallow diagnose`) or `repair.json` (of `fallow repair`) gets a block in
its report; `write_page` makes a page of one diagnosis alone, for a model that is no run. Both are views of the JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fallow.report.analysis import Comparison
from fallow.report.figures import Figure, colours
from fallow.report.heat import heat_map
from fallow.report.loading import lookup
from fallow.report.view import NONE, Cell, Facts, Row

DIAGNOSIS, REPAIR = "diagnosis.json", "repair.json"
CHANGES = {
    "dense": "the whole layer dense",
    "oracle": "the truly best channels instead of the predictor's",
    "scale": "its output scaled to fit best",
    "gate one": "survivors not multiplied by the gate",
}


@dataclass(kw_only=True, slots=True)
class Block:
    """One model's."""

    label: str
    sentence: str
    cards: list[Cell]
    maps: list[Figure]
    gaps: Facts | None
    layers: Facts | None
    causes: Facts | None
    repair: str
    tries: Facts | None
    """What was tried to mend it, and what came of each."""


def blocks(comparison: Comparison) -> list[Block]:
    """One per run with a diagnosis or a repair beside its run.json."""
    palette = colours(comparison)
    found = []
    for position, arm in enumerate(comparison.arms):
        for run in arm.runs:
            diagnosis, repair = _read(run.path / DIAGNOSIS), _read(run.path / REPAIR)
            if diagnosis or repair:
                found.append(
                    block(diagnosis, repair, label=arm.label, key=f"diagnosis{position}", colour=palette[arm.name])
                )
    return found


def block(
    diagnosis: dict[str, Any], repair: dict[str, Any], *, label: str, key: str = "diagnosis", colour: int = 1
) -> Block:
    """The figures and tables of one model. `key` begins the names of its figures."""
    return Block(
        label=label,
        sentence=str(diagnosis.get("verdict") or ""),
        cards=_cards(diagnosis),
        maps=_maps(diagnosis, key, colour),
        gaps=_gaps(diagnosis),
        layers=_layers(diagnosis),
        causes=_causes(diagnosis),
        repair=str(repair.get("summary") or ""),
        tries=_tries(repair),
    )


def write_page(diagnosis: dict[str, Any], out: Path, repair: dict[str, Any] | None = None) -> Path:
    """One self-contained page about one diagnosis. Raises OSError: `out` cannot be written."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    made = block(diagnosis, repair or {}, label=str(lookup(diagnosis, "model", "name") or "model"))
    for figure in made.maps:
        figure.body = Markup(figure.body)  # our own drawing: what texts it holds were escaped where they entered it
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    html = environment.get_template("diagnosis_page.html").render(
        block=made, style=Markup((here / "style.css").read_text(encoding="utf-8"))
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        draft.write_text(html, encoding="utf-8")
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return out


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _interval(held: dict[str, float], decimals: int = 3) -> Cell:
    return Cell(
        value=f"{held['mean']:+.{decimals}f}", note=f"{held['low']:+.{decimals}f} to {held['high']:+.{decimals}f}"
    )


def _cards(diagnosis: dict[str, Any]) -> list[Cell]:
    found = []
    for held in diagnosis.get("lengths") or []:
        note = f"nats per answer token cost at {held['length']:,} tokens, sparse over dense"
        found.append(Cell(value=f"{held['gap']['mean']:+.3f}", note=note, css="bad" if held["significant"] else "good"))
    sweep = diagnosis.get("sweep")
    if sweep:
        note = "leads both sweeps: the failure is its own" if sweep["local"] else "leads, but not alone"
        found.append(Cell(value=f"layer {sweep['layer']}", note=note))
        found.append(Cell(value=f"{sweep['share']:.0%}", note="of the gap is gone when that layer alone is dense"))
    return found


def _maps(diagnosis: dict[str, Any], key: str, colour: int) -> list[Figure]:
    sweep = diagnosis.get("sweep")
    if not sweep:
        return []
    held = sweep["by_length"]
    top = max((max(v) for by in held.values() for v in (by["restore"], by["mirror"])), default=0.0)
    found = []
    for name, title, words in (
        ("restore", "What does a dense layer bring back?", "This layer dense, all others sparse: nats brought back."),
        ("mirror", "What does a sparse layer cost?", "This layer sparse, all others dense: nats lost."),
    ):
        columns = [(length, by[name]) for length, by in held.items()]
        leader = sweep[name]["leader"]
        body = heat_map(f"{title} By layer and length", columns, colour=colour or 1, top=top, leader=leader)
        sure = f"Layer {leader} leads in {sweep[name]['certainty']:.0%} of resampled sets of documents."
        scale = f"Full colour is {top:.3f} nats per answer token in both maps."
        found.append(Figure(key=f"{key}-{name}", title=title, body=body, caption=f"{words} {sure} {scale}"))
    return found


def _gaps(diagnosis: dict[str, Any]) -> Facts | None:
    rows = [
        Row(
            name=f"{gap['task']}, {gap['length']:,}",
            cells=[
                Cell(value=f"{gap['dense']:.3f}"),
                Cell(value=f"{gap['sparse']:.3f}"),
                _interval(gap["gap"]),
                Cell(value="yes" if gap["significant"] else "no"),
            ],
        )
        for gap in diagnosis.get("gaps") or []
    ]
    columns = ["Dense", "Sparse", "Gap", "Significant"]
    return Facts(title="Nats per answer token, by task and length", columns=columns, rows=rows) if rows else None


def _layers(diagnosis: dict[str, Any]) -> Facts | None:
    sweep = diagnosis.get("sweep")
    if not sweep:
        return None
    restore, mirror = sweep["restore"], sweep["mirror"]
    rows = [
        Row(
            name=f"layer {layer}",
            cells=[Cell(value=f"{restore['nats'][layer]:+.4f}"), Cell(value=f"{mirror['nats'][layer]:+.4f}")],
        )
        for layer in range(len(restore["nats"]))
    ]
    return Facts(title="Every layer", columns=["Dense: brings back", "Sparse: costs"], rows=rows)


def _causes(diagnosis: dict[str, Any]) -> Facts | None:
    causes = diagnosis.get("causes")
    if not causes:
        return None
    rows = [
        Row(
            name=CHANGES.get(name, f"{name} of {diagnosis['bank']} channels"),
            cells=[_interval(found["nats"]), Cell(value=f"{found['share']:.0%}")],
        )
        for name, found in causes["changes"].items()
    ]
    rows += [
        Row(
            name=f"cost on tokens {words} an answer",
            cells=[
                _interval(causes["classes"][name]["nats"]),
                Cell(value=f"{causes['classes'][name]['tokens']} tokens"),
            ],
        )
        for name, words in (("begin", "that begin"), ("inside", "inside"), ("between", "between parts of"))
        if name in causes["classes"]
    ]
    return Facts(title=f"Changes to layer {causes['layer']} alone", columns=["Brings back", "Share"], rows=rows)


def _tries(repair: dict[str, Any]) -> Facts | None:
    rows = []
    for held in repair.get("tries") or []:
        recovered = held.get("recovered")
        rows.append(
            Row(
                name=held["what"],
                cells=[
                    Cell(value=NONE if recovered is None else f"{recovered:.0%}"),
                    Cell(value=held["outcome"]),
                    Cell(value=held.get("reason") or ""),
                ],
            )
        )
    columns = ["Lost score back", "Outcome", "Why"]
    return Facts(title="Repairs tried, cheapest first", columns=columns, rows=rows) if rows else None
