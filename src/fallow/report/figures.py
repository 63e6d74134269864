"""From arms to drawn figures: which lines each chart shows, in which units, and the sentence under it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fallow.report import bars, charts, svg, wording
from fallow.report.analysis import WIDEST_READING, Arm, Comparison, curve, interpolate, seed_of
from fallow.report.charts import Axis, Series
from fallow.report.loading import Run, number

TIME_PARTS = ("forward", "backward", "optimizer", "selection", "evaluation", "checkpoint", "data", "other")
THIN_POINTS, HOVER_POINTS, MAP_COLUMNS, MOST_MARKS = 240, 120, 48, 200
MEASURES = {"omit_ffn": ("FFN channels", "omitted"), "omit_heads": ("attention heads", "omitted")}
"""Rates per layer whose names need words: (of what, what the rate says). Others are called as they are logged."""

BESIDES = ("distill", "hidden_loss", "predictor_loss")
"""Settings above 0 with which a run's training loss has more in it than the text's: no curve beside held-out losses."""


@dataclass(kw_only=True, slots=True)
class Figure:
    """One drawn figure. `body` is markup, everything else plain text."""

    key: str
    title: str
    body: str
    caption: str = ""


def colours(comparison: Comparison) -> dict[str, int]:
    """Arm name -> series colour; the baseline is always 0, the page's ink."""
    others = [arm.name for arm in comparison.arms if arm is not comparison.baseline]
    found = {name: 1 + i % (charts.COLOURS - 1) for i, name in enumerate(others)}
    if comparison.baseline is not None:
        found[comparison.baseline.name] = 0
    return found


def pooled(
    runs: Sequence[Run], lines: str, x: str, y: Callable[[Run, dict[str, Any]], float | None]
) -> tuple[list[svg.Point], list[float], list[float]]:
    """`(mean x and y, lowest y, highest y)` over repeats, at the steps all of them logged; no range for one run."""
    tables: list[dict[float, tuple[float, float]]] = []
    for run in runs:
        table = {}
        for line in getattr(run, lines):
            at, value = number(line, x), y(run, line)
            if at is not None and value is not None:
                table[line["step"]] = (at, value)
        tables.append(table)
    filled = [table for table in tables if table]
    if not filled:
        return [], [], []
    steps = sorted(set.intersection(*(set(table) for table in filled))) or sorted(filled[0])
    columns = [[table[step] for table in filled if step in table] for step in steps]
    ends = [max(table) for table in filled]
    if min(ends) > steps[-1]:
        # Repeats planned by seconds end at steps a little apart; their ends still belong together.
        columns.append([table[end] for table, end in zip(filled, ends, strict=True)])
    points = [(sum(a for a, _ in c) / len(c), sum(b for _, b in c) / len(c)) for c in columns]
    if len(filled) == 1:
        return points, [], []
    return points, [min(b for _, b in c) for c in columns], [max(b for _, b in c) for c in columns]


def loss_figures(comparison: Comparison) -> list[Figure]:
    """Loss against tokens and against seconds, and under each the gap to the baseline."""
    figures = []
    for axis, words in (("tokens", "tokens"), ("seconds", "time")):
        series, x, y = _loss_series(comparison, axis)
        body = charts.line_chart(f"loss-{axis}", series, x, y)
        caption = "Ticks above the axis: the topology moved." if any(s.marks for s in series) else ""
        mixed = [arm.label for arm in comparison.arms if any(number(arm.runs[0].info, "method", k) for k in BESIDES)]
        if mixed:
            caption += f" {', '.join(mixed)}: no thin line, as more than the text’s loss is trained on."
        title = f"Loss against {words}"
        figures.append(Figure(key=f"loss-{axis}", title=title, body=body, caption=caption.strip()))
    if comparison.baseline is None or len(comparison.arms) < 2:
        return figures
    base = comparison.baseline.label
    for axis, words in (("tokens", "at equal tokens"), ("seconds", "at equal seconds")):
        series = _gap_series(comparison, comparison.baseline, axis)
        x = _x_axis(axis, [p[0] for s in series for p in s.points])
        y = Axis(title="gap (nats)", decimals=4)
        sides = (f"worse than {base}", f"better than {base}")
        body = charts.line_chart(f"gap-{axis}", series, x, y, zero=sides)
        figures.append(Figure(key=f"gap-{axis}", title=f"Gap to {base} {words}", body=body))
    return figures


def _x_axis(axis: str, values: Sequence[float]) -> Axis:
    most = max(values, default=1.0)
    if axis == "tokens":
        unit, scale = next(((u, s) for s, u in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if most >= 2 * s), ("", 1.0))
        title = {"B": "billion tokens", "M": "million tokens", "k": "thousand tokens", "": "tokens"}[unit]
        return Axis(
            title=f"{title} trained on", scale=scale, low=0.0, high=most, unit=f"{unit} tokens".strip(), decimals=1
        )
    unit, scale = ("h", 3600.0) if most >= 3 * 3600 else ("min", 60.0) if most >= 180 else ("s", 1.0)
    title = {"h": "hours", "min": "minutes", "s": "seconds"}[unit]
    return Axis(title=f"{title} of training", scale=scale, low=0.0, high=most, unit=unit, decimals=1)


def _loss_series(comparison: Comparison, axis: str) -> tuple[list[Series], Axis, Axis]:
    palette = colours(comparison)
    series: list[Series] = []
    for arm in comparison.arms:
        points, low, high = pooled(arm.runs, "evals", axis, lambda _, line: number(line, "loss"))
        series.append(Series(name=arm.label, colour=palette[arm.name], points=points, marked=True, low=low, high=high))
        series[-1].marks = _updates(arm.runs[0], axis)
        for run in arm.runs:
            if any(number(run.info, "method", key) for key in BESIDES):
                continue
            raw = [(line[axis], line["loss"]) for line in run.train]
            line = svg.thin_out(svg.smooth(raw, max(1, len(raw) // 25)), THIN_POINTS)
            series.append(Series(name=arm.label, colour=palette[arm.name], points=line, css="thin"))
    evaluated = [p[1] for s in series if s.marked for p in s.points]
    trained = sorted(p[1] for s in series if not s.marked for p in s.points)
    y = Axis(title="loss (nats per token)")
    if evaluated:
        # The evaluations set the range, or a noisy first training loss would press all of them flat.
        room = 0.35 * (max(evaluated) - min(evaluated)) + 0.02
        y.low = min(evaluated) - (min(room, max(0.0, min(evaluated) - trained[0])) if trained else 0.0) - 0.15 * room
        y.high = max(evaluated) + (min(room, max(0.0, trained[-1] - max(evaluated))) if trained else 0.0) + 0.15 * room
    elif series:
        for s in series:
            s.css = "line"
        series = [s for s in series if s.points]
    return series, _x_axis(axis, [p[0] for s in series for p in s.points]), y


def _updates(run: Run, axis: str) -> list[float]:
    """Where a count of updates that the method logs (`…/updates`) had grown since the line before."""
    found, before = [], 0.0
    for line in run.train:
        count = sum(number(line, key) or 0.0 for key in line if key.endswith("/updates"))
        if count > before:
            found.append(float(line[axis]))
        before = max(before, count)
    return found if len(found) <= MOST_MARKS else []


def _gap_series(comparison: Comparison, baseline: Arm, axis: str) -> list[Series]:
    palette = colours(comparison)

    def to_baseline(run: Run, line: dict[str, Any]) -> float | None:
        same = [other for other in baseline.runs if seed_of(other) == seed_of(run)] or baseline.runs
        theirs = [
            y for other in same if (y := interpolate(curve(other, axis), line[axis], widest=WIDEST_READING)) is not None
        ]
        return line["loss"] - sum(theirs) / len(theirs) if theirs else None

    found = []
    for arm in comparison.arms:
        if arm is not baseline:
            points, low, high = pooled(arm.runs, "evals", axis, to_baseline)
            found.append(
                Series(name=arm.label, colour=palette[arm.name], points=points, marked=True, low=low, high=high)
            )
    return found


def run_figures(comparison: Comparison) -> list[Figure]:
    """Throughput and memory through the run."""
    figures = []
    for key, field, title, unit, scale in (
        ("throughput", "tokens_per_second", "Throughput", "tokens/s", 1.0),
        ("memory", "memory_mb", "Memory", "GB", 1024.0),
    ):
        series = []
        for arm in comparison.arms:
            points, _, _ = pooled(arm.runs, "train", "tokens", lambda _, line, f=field: number(line, f))
            points = svg.thin_out(svg.smooth(points, max(1, len(points) // 40)), HOVER_POINTS)
            series.append(Series(name=arm.label, colour=colours(comparison)[arm.name], points=points))
        values = [p[1] for s in series for p in s.points]
        x = _x_axis("tokens", [p[0] for s in series for p in s.points])
        y = Axis(title=unit, scale=scale, low=0.0, high=1.08 * max(values, default=1.0), unit=unit)
        y.decimals = 2 if key == "memory" else 0
        figures.append(Figure(key=key, title=title, body=charts.line_chart(key, series, x, y)))
    return figures


def time_figure(comparison: Comparison) -> Figure:
    """Where the seconds of each arm went: mean over its repeats."""
    rows = []
    for arm in comparison.arms:
        timed = [run for run in arm.runs if isinstance(run.info.get("time"), dict)]
        parts = [
            (part, sum(max(number(run.info, "time", part) or 0.0, 0.0) for run in timed) / max(len(timed), 1))
            for part in TIME_PARTS
        ]
        rows.append((arm.label, parts, wording.duration(sum(value for _, value in parts))))
    body = bars.stacked_bars(
        rows,
        amount=lambda value: f"{value:,.1f} s",
        swatches={part: f"t-{part}" for part in TIME_PARTS},
        inside=lambda _, share: f"{share:.0%}",
    )
    return Figure(key="time", title="Where the time goes", body=body)


def schedule_figure(comparison: Comparison) -> Figure | None:
    """Omission rates over the run; None when nothing was ever omitted."""
    series = []
    for arm in comparison.sparse:
        for field, what, css in (("omit_ffn", "channels", "line"), ("omit_heads", "heads", "line dashed")):
            points, _, _ = pooled(arm.runs, "train", "tokens", lambda _, line, f=field: number(line, f))
            if any(y > 0 for _, y in points):
                colour = colours(comparison)[arm.name]
                thinned = points if len(points) <= 400 else points[:: len(points) // 400 + 1] + points[-1:]
                twin = next((s for s in series if s.css == css and s.points == thinned), None)
                if twin is not None:
                    twin.name = f"{twin.name.removesuffix(what)}+ {arm.label} {what}"
                else:
                    name = f"{arm.label} {what}"
                    series.append(Series(name=name, colour=colour, points=thinned, css=css, step=True))
    if not series:
        return None
    most = max(p[1] for s in series for p in s.points)
    y = Axis(title="omitted (%)", scale=0.01, low=0.0, high=min(1.0, 1.15 * most), unit="%", decimals=0)
    x = _x_axis("tokens", [p[0] for s in series for p in s.points])
    return Figure(
        key="schedule", title="How much was left out", body=charts.line_chart("schedule", series, x, y, full=True)
    )


def layer_figures(comparison: Comparison, *, besides: Collection[str] = ()) -> list[Figure]:
    """Maps of what was measured per layer and step, for each sparse arm's first run that logged layers; `besides` names
    arms whose layers are drawn elsewhere."""
    found = []
    for arm in comparison.sparse:
        if arm.name in besides:
            continue
        run = next((run for run in arm.runs if run.layers), None)
        lines = run.layers if run else []
        for field in layer_measures(lines):
            what, rate = MEASURES.get(field, (field.replace("_", " "), ""))
            columns = [(int(line["step"]), rates) for line in lines if (rates := _rates(line.get(field)))]
            width = len(columns[0][1]) if columns else 0
            columns = [column for column in columns if len(column[1]) == width]
            top = max((max(rates) for _, rates in columns), default=0.0)
            if not columns or top <= 0:
                continue
            stride = len(columns) // MAP_COLUMNS + 1
            kept = columns[::stride]
            steps = [step for step, _ in kept[:-1]] + [columns[-1][0]]
            caption = f"First layer on top; full colour is {top:.0%} {rate}".rstrip() + "."
            if all(min(rates) == top for _, rates in columns):
                # One shade all over shows nothing that a sentence does not say.
                words = f"<b>{100 * top:.3g}%</b> in each of {width} layers, from step {steps[0]} to {steps[-1]}."
                body, caption = f'<p class="same">{words}</p>', ""
            else:
                colour = colours(comparison)[arm.name]
                body = bars.layer_map(arm.label, colour, steps, [r for _, r in kept], top=top, what=rate or what)
            found.append(
                Figure(key=f"layers-{arm.name}-{field}", title=f"{arm.label}: {what}", body=body, caption=caption)
            )
    return found


def layer_measures(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the rates that lines of layers hold, the known ones first."""
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, list))
    return [name for name in MEASURES if name in names] + [name for name in names if name not in MEASURES]


def _rates(value: object) -> list[float]:
    """One rate per layer, empty where the line holds anything else."""
    if not isinstance(value, list) or not all(isinstance(rate, (int, float)) and rate >= 0 for rate in value):
        return []
    return [float(rate) for rate in value]
