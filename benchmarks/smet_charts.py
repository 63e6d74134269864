"""The SVG figures of docs/results/smet.md, drawn from what `smet_collate.py` reads out of the results."""

from __future__ import annotations

import re
import statistics
from typing import Any

from results_page import standalone
from smet_arms import DENSITIES, METHODS
from smet_collate import Summary

from fallow.report.charts import Axis, Series, line_chart

Data = dict[str, Any]


def density_chart(of: dict[str, Summary]) -> str:
    """Final loss against density, one line per method; dense, and the smaller dense models, dashed."""
    percents = sorted(DENSITIES, key=lambda p: DENSITIES[p])
    series = []
    for colour, method in enumerate((*METHODS, "small"), start=1):
        there = [p for p in percents if f"{method}-{p}" in of]
        losses = [list(of[f"{method}-{p}"].losses.values()) for p in there]
        series.append(
            Series(
                name="smaller dense" if method == "small" else method,
                colour=0 if method == "small" else colour,
                points=[(DENSITIES[p], statistics.fmean(x)) for p, x in zip(there, losses, strict=True)],
                marked=True,
                css="line dashed" if method == "small" else "line",
                low=[min(x) for x in losses],
                high=[max(x) for x in losses],
            )
        )
    dense = statistics.fmean(of["dense"].losses.values())
    series.append(Series(name="dense", colour=0, points=[(0.05, dense), (0.5, dense)], css="line"))
    title = "density (smaller dense: same bytes of state)"
    body = line_chart("density", series, Axis(title=title), Axis(title="held-out loss, nats per token"))
    return _drawn(body)


def spike_chart(data: Data) -> str:
    """Loss after one update against the same steps without it, one line per branch, density 0.25."""
    found = [r for r in data["rows"] if r["density"] == 0.25] or data["rows"]
    words = {"set": "plain SET", "reset": "own clock only", "smet": "SMET"}
    series = []
    for colour, (branch, name) in enumerate(words.items(), start=1):
        mean = [statistics.fmean(c) for c in zip(*(r["curves"][branch] for r in found[:1]), strict=True)]
        points = [(float(i), y) for i, y in enumerate(mean)]
        series.append(Series(name=name, colour=colour, points=points, marked=True))
    axis = Axis(title="steps after the update (0: at once)")
    return _drawn(line_chart("spike", series, axis, Axis(title="loss against the same steps without it, nats")))


def _drawn(body: str) -> str:
    found = re.search(r'<svg class="chart wide".*?</svg>', body, flags=re.S)
    if found is None:
        raise ValueError("nothing to draw")
    return standalone(found[0])
