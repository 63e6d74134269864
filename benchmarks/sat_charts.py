"""The SVG figures of docs/results/sat.md, drawn from the JSON files of benchmarks/results by `sat_figures.py`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

from results_page import standalone

from fallow.report import svg
from fallow.report.analysis import interpolate
from fallow.report.charts import COLOURS, Axis, Series, line_chart
from fallow.report.svg import Scale

SETTLED = 0.3
"""The loss axis ends at the highest loss an arm has after this share of its run: the fall before it hides the rest."""

Data = dict[str, Any]


def mean_curve(runs: Sequence[Data], axis: str, colour: int) -> Series:
    """Held-out loss of one arm: mean and range over its seeds, at equal shares of each run."""
    first = runs[0]["curve"]
    shares = [point["step"] / first[-1]["step"] for point in first]

    def read(run: Data, key: str, share: float) -> float:
        points = [(p["step"], p[key]) for p in run["curve"]]
        at = min(share * points[-1][0], points[-1][0])
        value = interpolate(points, at)
        if value is None:
            raise ValueError(f"the curve of arm {run['arm']}, seed {run['seed']}, does not begin at step 0")
        return value

    losses = [[read(run, "loss", share) for run in runs] for share in shares]
    places = [[read(run, axis, share) for run in runs] for share in shares]
    return Series(
        name=runs[0]["arm"],
        colour=colour,
        points=[(sum(x) / len(x), sum(y) / len(y)) for x, y in zip(places, losses, strict=True)],
        marked=True,
        css="line dashed" if runs[0]["method"] is None and runs[0]["arm"] != "dense" else "line",
        low=[min(y) for y in losses] if len(runs) > 1 else [],
        high=[max(y) for y in losses] if len(runs) > 1 else [],
    )


def arm_colours(rows: Sequence[Data]) -> dict[str, int]:
    """Every dense arm in the first colour, every form of SAT in one of its own."""
    methods = {row["arm"]: row["method"] for row in rows}
    sparse = [arm for arm, method in methods.items() if method is not None]
    return {arm: 0 if method is None else 1 + sparse.index(arm) % (COLOURS - 1) for arm, method in methods.items()}


def loss_ceiling(ends: Sequence[float]) -> float:
    """Final losses above this are named at the upper edge, so that one bad control does not flatten all others."""
    return min(ends) + 3 * (statistics.median(ends) - min(ends)) or max(ends)


def curves_chart(data: Data, axis: str, x: Axis) -> str:
    """Held-out loss against seconds or tokens, one line per arm, range over seeds shaded."""
    colours = arm_colours(data["runs"])
    series = [mean_curve([r for r in data["runs"] if r["arm"] == arm], axis, c) for arm, c in colours.items()]
    ceiling = loss_ceiling([s.points[-1][1] for s in series])
    within = [s for s in series if s.points[-1][1] <= ceiling]
    for s in series:
        if s not in within:
            s.name += f" ↑ {s.points[-1][1]:.2f}"
    high = max(y for s in within for px, y in s.points if px >= SETTLED * s.points[-1][0])
    low = min(v for s in series for v in (*(y for _, y in s.points), *s.low))
    room = 0.05 * (high - low) or 0.01
    body = line_chart(axis, series, x, Axis(title="held-out loss, nats per token", low=low - room, high=high + room))
    drawing = re.search(r'<svg class="chart wide".*?</svg>', body, flags=re.S)
    if drawing is None:
        raise ValueError(f"{data['experiment']}: no arm has two evaluations to draw a line through")
    return standalone(drawing[0])


def front_chart(data: Data) -> str:
    """Where each arm ended: final loss against all its training seconds, whiskers over seeds. Lower left wins.

    The dashed line joins the complete dense runs: a form of SAT pays when it ends below it.
    """
    rows = data["summary"]
    width, height, left, right, top, bottom = 760, 380, 54.0, 740.0, 26.0, 340.0
    ceiling = loss_ceiling([row["eval_loss"]["mean"] for row in rows])
    xs = [v for row in rows for v in row["train_seconds"]["values"]]
    ys = [v for row in rows if row["eval_loss"]["mean"] <= ceiling for v in row["eval_loss"]["values"]]
    pad_x, pad_y = 0.12 * (max(xs) - min(xs)) or 1.0, 0.08 * (max(ys) - min(ys)) or 0.01
    across = Scale(low=min(xs) - pad_x / 2, high=max(xs) + pad_x, start=left, end=right)
    up = Scale(low=min(ys) - pad_y, high=max(ys) + pad_y, start=bottom, end=top)
    parts = _grid(across, up, "training seconds of the whole run", "held-out loss at the end, nats per token")
    dense = sorted((r["train_seconds"]["mean"], r["eval_loss"]["mean"]) for r in rows if r["method"] is None)
    parts.append(svg.path([(across(a), up(b)) for a, b in dense], css="line dashed c0"))
    ends = [(across(r["train_seconds"]["mean"]), max(up(r["eval_loss"]["mean"]), top)) for r in rows]
    places = svg.spread_labels([y for _, y in ends], apart=15, low=top, high=bottom)
    colours, labels = arm_colours(rows), []
    for i, (row, (x, y), place) in enumerate(zip(rows, ends, places, strict=True)):
        colour = f"c{colours[row['arm']]}"
        loss = row["eval_loss"]
        name = row["arm"] if loss["mean"] <= ceiling else f"{row['arm']} ↑ {loss['mean']:.2f}"
        low, high = (max(up(v), top) for v in (loss["low"], loss["high"]))
        near, far = across(row["train_seconds"]["low"]), across(row["train_seconds"]["high"])
        parts.append(f'<line class="whisker {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(f'<line class="whisker {colour}" x1="{near:.1f}" x2="{far:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg.marker(x, y, i, css=f"dot {colour}", size=4.4))
        flip = x > right - 8 * len(name) - 14
        if abs(place - y) > 6:
            leader = f'x1="{x:.1f}" y1="{y:.1f}" x2="{x + (-9 if flip else 9):.1f}" y2="{place:.1f}"'
            parts.append(f'<line class="leader {colour}" {leader}/>')
        at = x - 11 if flip else x + 11
        labels.append(svg.text(at, place + 4, name, css=f"label {colour}", anchor="end" if flip else "start"))
    return standalone(f'<svg viewBox="0 0 {width} {height}" role="img">{"".join([*parts, *labels])}</svg>')


def bench_chart(data: Data) -> str:
    """One bar per case and rate: measured ratio, with the FLOP-ideal as a mark."""
    rows = data["rows"]
    left, right, top, apart = 250.0, 700.0, 34.0, 30.0
    across = Scale(low=0.0, high=max(max(r["ratio"], r["ideal"]) for r in rows) * 1.12, start=left, end=right)
    bottom = top + apart * len(rows)
    parts = [svg.text(4, 16, "step throughput, SAT / fastest dense; dashed mark: FLOP-ideal", css="title")]
    for value in svg.ticks(0.0, across.high, 6):
        x = across(value)
        parts.append(
            f'<line class="{"axis" if value == 1 else "grid"}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
        )
        parts.append(svg.text(x, bottom + 16, svg.tick_text(value, 0.5) + "×", css="tick", anchor="middle"))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for i, row in enumerate(rows):
        y, end, ideal = top + apart * i + 6, across(row["ratio"]), across(row["ideal"])
        parts.append(svg.text(left - 8, y + 13, _bench_label(row), css="tick", anchor="end"))
        colour = f"c{(cases.index(row['case']) + 1) % COLOURS}"
        parts.append(f'<rect class="bar {colour}" x="{left}" y="{y}" width="{end - left:.1f}" height="18" rx="2"/>')
        parts.append(f'<line class="ideal" x1="{ideal:.1f}" x2="{ideal:.1f}" y1="{y - 3}" y2="{y + 21}"/>')
        words = f"{row['ratio']:.2f}× of {row['ideal']:.2f}×"
        parts.append(svg.text(max(end, ideal) + 8, y + 13, words, css="value"))
    return standalone(f'<svg viewBox="0 0 {right + 110:.0f} {bottom + 26:.0f}" role="img">{"".join(parts)}</svg>')


def _bench_label(row: Data) -> str:
    where = "" if row["omit_in"] == "forward+backward" else f" {row['omit_in']}"
    return f"{row['case']}, omit {row['omit']:.2f}{where}"


def _grid(across: Scale, up: Scale, x_title: str, y_title: str) -> list[str]:
    parts = [svg.text(4, 13, y_title, css="title")]
    for scale, vertical in ((up, True), (across, False)):
        values = svg.ticks(scale.low, scale.high, 6)
        step = values[1] - values[0] if len(values) > 1 else 1.0
        for value in values:
            at, words = scale(value), svg.tick_text(value, step)
            if vertical:
                parts.append(f'<line class="grid" x1="{across.start}" x2="{across.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
                parts.append(svg.text(across.start - 7, at + 4, words, css="tick", anchor="end"))
            else:
                parts.append(svg.text(at, up.start + 17, words, css="tick", anchor="middle"))
    parts.append(f'<line class="axis" x1="{across.start}" x2="{across.end}" y1="{up.start}" y2="{up.start}"/>')
    parts.append(svg.text((across.start + across.end) / 2, up.start + 35, x_title, css="title", anchor="middle"))
    return parts
