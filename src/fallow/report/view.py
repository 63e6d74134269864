"""The page's contents: every table and list the template shows, as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fallow.report import figures, wording
from fallow.report.analysis import Arm, Comparison, Spread, method_label
from fallow.report.doubts import BUSY, drift
from fallow.report.loading import Run, lookup, number
from fallow.report.upcycle_data import read as upcycled

NONE = "–"


@dataclass(kw_only=True, slots=True)
class Cell:
    """One figure of a table: the value, what its repeats say, and whether it is good news."""

    value: str
    note: str = ""
    css: str = ""


@dataclass(kw_only=True, slots=True)
class Row:
    """One line of a table; `differs` marks cells unlike the baseline's."""

    name: str
    cells: list[Cell]
    css: str = ""


@dataclass(kw_only=True, slots=True)
class Facts:
    """A table of settings: one column per arm, or a single one where all arms agree."""

    title: str
    columns: list[str]
    rows: list[Row] = field(default_factory=list)


ARM_COLUMNS = (
    ("Tokens/s", "speed of training"),
    ("vs dense", "tokens per second, as a multiple of the baseline's"),
    ("Final loss", "evaluation loss at the end, nats per token; lower is better"),
    ("Gap, equal tokens", "loss minus the baseline's after as many tokens"),
    ("Gap, equal seconds", "loss minus the baseline's after as many seconds"),
    ("Peak memory", "of the process while training"),
    ("Train time", "evaluation and checkpoints left out"),
)


def arm_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The table of arms."""
    palette = figures.colours(comparison)
    rows, steady = [], drift(comparison) <= BUSY
    for arm in comparison.arms:
        base = arm is comparison.baseline
        judged = arm.method is not None and not arm.aside
        cells = [
            _cell(arm.tokens_per_second, wording.rate),
            Cell(value="baseline") if base else _cell(arm.ratio, wording.times),
            _loss_cell(arm),
            Cell(value=NONE) if base else _gap_cell(arm.gap_tokens, judged=judged),
            Cell(value=NONE)
            if base
            else _gap_cell(arm.gap_seconds, judged=judged and steady and not arm.for_serving, control=arm.control),
            _cell(arm.peak_memory_mb, wording.memory),
            _cell(arm.train_seconds, wording.duration),
        ]
        rows.append(
            {
                "label": arm.label,
                "colour": palette[arm.name],
                "about": _about(arm),
                "status": arm.status if arm.status != "finished" else "",
                "cells": list(zip((name for name, _ in ARM_COLUMNS), cells, strict=True)),
            }
        )
    return rows


def _about(arm: Arm) -> str:
    words = (
        [method_label(arm.method) if arm.method else "dense"] if arm.label.lower() != (arm.method or "dense") else []
    )
    if arm.method is not None:
        for key, what in (("omit", "of channels"), ("heads", "of heads")):
            rates = number(arm.runs[0].info, "method", key)
            if rates:
                words.append(f"omits {rates:.0%} {what}" if "omits" not in " ".join(words) else f"{rates:.0%} {what}")
        density = number(arm.runs[0].info, "method", "density")
        if density:
            words.append(f"keeps {density:.0%} of the weights")
        if number(arm.runs[0].info, "method", "experts"):
            words.append(wording.experts(arm.runs[0].info["method"]))
    if (run := upcycled(arm.runs[0])) is not None:
        words.append(f"{run.kept} channels, {'control' if arm.aside else f'{run.kind} predictor'}")
    if arm.tokens:
        words.append(f"{wording.tokens(arm.tokens.mean)} tokens")
    if len(arm.runs) > 1:
        words.append(f"{len(arm.runs)} seeds")
    return ", ".join(words)


def _cell(spread: Spread | None, words: Callable[[float], str]) -> Cell:
    if spread is None:
        return Cell(value=NONE)
    low, high = words(spread.low), words(spread.high)
    note = f"{low} to {high}" if low != high else ""
    return Cell(value=words(spread.mean), note=note)


def _loss_cell(arm: Arm) -> Cell:
    """The loss as the model will be served and, where it can be served both ways, the other."""
    cell = _cell(arm.loss, wording.loss)
    if arm.dense_loss is not None:
        cell.note = f"{cell.note} sparse; {wording.loss(arm.dense_loss.mean)} all channels".strip()
    elif arm.sparse_loss is not None:
        cell.note = f"{cell.note} {wording.loss(arm.sparse_loss.mean)} sparse".strip()
    return cell


def _gap_cell(spread: Spread | None, *, judged: bool = True, control: str | None = None) -> Cell:
    cell = _cell(spread, wording.signed)
    if control is not None:
        cell.note = f"{cell.note} vs {control}".strip()
    cell.css = {"won": "good", "lost": "bad"}.get(wording.outcome(spread), "") if judged else ""
    return cell


def key_figures(comparison: Comparison, arm_name: str) -> list[Cell]:
    """The big numbers under the headline: what the named arm bought."""
    arm = next(arm for arm in comparison.arms if arm.name == arm_name)
    base = comparison.baseline
    if base is None or arm is base:
        return []
    found = []
    if arm.ratio:
        css = "good" if arm.ratio.mean >= 1.005 else "bad" if arm.ratio.mean <= 0.995 else ""
        found.append(Cell(value=wording.times(arm.ratio.mean), note=f"the tokens per second of {base.label}", css=css))
    for spread, when in ((arm.gap_tokens, "tokens"), (arm.gap_seconds, "seconds")):
        if spread:
            cell = _gap_cell(spread)
            word = {"good": "better than", "bad": "worse than"}.get(cell.css, "level with")
            cell.note = (
                f"nats of loss at equal {when}, {word} {(arm.control if when == 'seconds' else None) or base.label}"
            )
            found.append(cell)
    if drift(comparison) > BUSY:
        found = [Cell(value=cell.value, note=cell.note) for cell in found]
    state = _change(arm.state_bytes, base.state_bytes, f"bytes of model state against {base.label}")
    peak = _change(arm.peak_memory_mb, base.peak_memory_mb, f"peak memory against {base.label}")
    found += [cell for cell in (state if state and state.css else None, peak) if cell]
    return found


def _change(ours: Spread | None, theirs: Spread | None, note: str) -> Cell | None:
    """How much less, or more."""
    if not ours or not theirs:
        return None
    change = ours.mean / theirs.mean - 1
    css = "good" if change < -0.005 else "bad" if change > 0.005 else ""
    return Cell(value=f"{change:+.0%}".replace("-", "\N{MINUS SIGN}") if css else "same", note=note, css=css)


def kinds_of_sparsity(comparison: Comparison) -> set[str]:
    """What sparse arms do, for the page's explanations: `omit` parts of the step, `keep` some weights only,
    compute `experts`, `choose` channels to be served with."""
    found = set()
    for arm in comparison.sparse:
        run = arm.runs[0]
        measures = figures.layer_measures(run.layers)
        omits = any(number(run.info, "method", key) for key in ("omit", "heads"))
        if omits or any(name.startswith("omit") for name in measures):
            found.add("omit")
        if number(run.info, "method", "density") or "density" in measures:
            found.add("keep")
        if number(run.info, "method", "experts"):
            found.add("experts")
        if arm.for_serving:
            found.add("choose")
    return found or {"omit"}


def settings(comparison: Comparison) -> tuple[Facts, Facts]:
    """`(what differs, everything)`: recipe and method of each arm's first run, flattened to dotted names."""
    columns = [arm.label for arm in comparison.arms]
    tables = [_flat_settings(arm.runs[0]) for arm in comparison.arms]
    every = Facts(title="All settings", columns=columns)
    differing = Facts(title="What differs", columns=columns)
    reference = comparison.arms.index(comparison.baseline) if comparison.baseline else 0
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [table.get(name, NONE) for table in tables]
        asked = [v for v, arm in zip(values, comparison.arms, strict=True) if arm.method] or values
        # A dense arm has no method settings, so sparse arms are held against the first of them.
        usual = {NONE, asked[0]} if name.startswith("method.") and len(asked) > 1 else {values[reference]}
        row = Row(name=name, cells=[Cell(value=v, css="" if v in usual else "differs") for v in values])
        every.rows.append(row)
        if len(set(asked if name.startswith("method.") and len(asked) > 1 else values)) > 1:
            differing.rows.append(row)
    return differing, every


def _flat_settings(run: Run) -> dict[str, str]:
    recipe = lookup(run.info, "recipe")
    method = lookup(run.info, "method")
    flat = _flatten(recipe, "") if isinstance(recipe, dict) else {}
    # The resolved method stands in its own entry; the recipe's copy would list every field twice.
    doubled = ("method", "method_settings", "arms")
    flat = {name: value for name, value in flat.items() if name.split(".")[0] not in doubled}
    if isinstance(method, dict):
        flat |= _flatten(method, "method.")
    return flat


def _flatten(value: dict[str, Any], prefix: str) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(item)
    return flat


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return ", ".join(_plain(item) for item in value) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


SECTIONS = (
    ("Model", ("model",)),
    ("Data", ("data",)),
    ("Machine", ("machine",)),
    ("Precision, and why", ("precision",)),
    ("Backends used", ("backends",)),
    ("Versions", ("versions",)),
)


def facts(runs: Sequence[Run]) -> list[Facts]:
    """Model, data, machine, precision, backends and versions; one column where all runs agree."""
    found = []
    for title, keys in SECTIONS:
        held = [value if isinstance(value := lookup(run.info, *keys), dict) else {} for run in runs]
        if any(held):
            found.append(_side_by_side(title, runs, [_flatten(value, "") for value in held]))
    found.append(_side_by_side("Runs", runs, [_run_facts(run) for run in runs]))
    return found


def _side_by_side(title: str, runs: Sequence[Run], tables: list[dict[str, str]]) -> Facts:
    if all(table == tables[0] for table in tables):
        columns, tables = ["all runs" if len(runs) > 1 else runs[0].arm], tables[:1]
    else:
        columns = [run.arm for run in runs]
    table = Facts(title=title, columns=columns)
    for name in dict.fromkeys(name for t in tables for name in t):
        values = [t.get(name, NONE) for t in tables]
        cells = [Cell(value=value, css="" if value == values[0] else "differs") for value in values]
        table.rows.append(Row(name=name.replace("_", " "), cells=cells))
    return table


def _run_facts(run: Run) -> dict[str, str]:
    found = {"folder": str(run.path), "status": run.status}
    for key in ("started", "finished", "command", "fallow"):
        value = lookup(run.info, key)
        if value:
            found["fallow version" if key == "fallow" else key] = str(value)
    for key in ("wall_seconds", "cpu_seconds"):
        value = number(run.info, "totals", key)
        if value is not None:
            found[key] = wording.duration(value)
    return found
