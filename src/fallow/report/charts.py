"""Line charts: series over tokens, seconds or steps, as SVG with direct labels.

Each line chart is drawn twice, for a wide and a narrow screen, because text in one scaled drawing is either too small
on a phone or too large on a laptop; the style sheet shows one. Hover values come from a small JSON beside the
drawing, and without JavaScript the page loses nothing but the hover.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from fallow.report import svg
from fallow.report.svg import Point, Scale

COLOURS = 7
"""How many series colours the style sheet defines: `c0` is the baseline's, then they repeat."""
LABEL_WIDTH = 6.9
"""Drawing units per character of a 12-unit label, measured on a wide system font."""
STRIP = 24
"""Drawing units that a strip of spans takes above the plot."""


@dataclass(kw_only=True, slots=True)
class Series:
    """One line."""

    name: str
    colour: int
    points: list[Point]
    marked: bool = False
    """Points as markers, and a direct label at the end."""
    css: str = "line"
    """`line`, `thin` (context, no hover) or `line dashed`."""
    step: bool = False
    """Hold each value until the next point."""
    low: list[float] = field(default_factory=list)
    """With `high`, the range over repeats, one value per point."""
    high: list[float] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    """Where on x something happened to this series: short ticks above the axis, each series on a level of its own."""


@dataclass(kw_only=True, slots=True)
class Axis:
    """What one axis shows, and how."""

    title: str
    scale: float = 1.0
    """Data values are divided by this before they are printed."""
    low: float | None = None
    """Where the axis begins; None for the data's own range."""
    high: float | None = None
    unit: str = ""
    decimals: int = 3
    """Of the values shown on hover."""
    whole: bool = False
    """Ticks at whole numbers only: layers, not lengths."""


@dataclass(kw_only=True, slots=True)
class Span:
    """A stretch of x in which something held: its shade lies behind the lines."""

    start: float
    end: float
    name: str
    css: str
    """Classes of the style sheet: of the shade and, with a strip, of its part of that."""


@dataclass(kw_only=True, slots=True)
class Ground:
    """What lies behind the lines besides the grid."""

    spans: Sequence[Span] = ()
    strip: bool = False
    """Spans also as a strip above the plot, with their names in it."""
    level: tuple[float, str] | None = None
    """A height to be reached or kept, as a dashed line, and what to call it."""
    zero: tuple[str, str] | None = None
    """Words for the two sides of y = 0, the side below tinted."""


def line_chart(
    key: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    zero: tuple[str, str] | None = None,
    full: bool = False,
    ground: Ground | None = None,
) -> str:
    """A figure body: two drawings, legend, hover data. `zero` words the sides of y = 0; `full` spans the page."""
    shown = [s for s in series if s.points]
    if not any(len(s.points) > 1 for s in shown):
        return '<p class="empty">Not enough was logged to draw this yet.</p>'
    ground = ground or Ground(zero=zero)
    drawings = "".join(
        _drawing(key, shown, x, y, width=width, height=height, css=css, ground=ground)
        for width, height, css in ((1140 if full else 560, 300 if full else 330, "wide"), (360, 270, "narrow"))
    )
    hover = [
        {"name": s.name, "c": s.colour % COLOURS, "p": [[round(a, 3), round(b, 5)] for a, b in s.points]}
        for s in shown
        if s.css != "thin"
    ]
    # A "<" in an arm's name could end the script element or open a comment in it.
    data = json.dumps(hover, separators=(",", ":")).replace("<", "\\u003c")
    script = f'<script type="application/json" id="data-{escape(key)}">{data}</script>'
    named = [s for s in shown if s.css != "thin"]
    items = "".join(f"<li>{legend_mark(s)}{escape(s.name)}</li>" for s in named)
    return f'{drawings}<ul class="legend narrow-only">{items}</ul>{script}'


def legend_mark(series: Series) -> str:
    line = f'<path class="{series.css} c{series.colour % COLOURS}" d="M1 6H23"/>'
    dot = svg.marker(12, 6, series.colour, css=f"dot c{series.colour % COLOURS}") if series.marked else ""
    return f'<svg class="mark" viewBox="0 0 24 12" aria-hidden="true">{line}{dot}</svg>'


def _domain(axis: Axis, values: Sequence[float], pad: float) -> tuple[float, float]:
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    return (low - room if axis.low is None else low), (high + room if axis.high is None else high)


def _drawing(
    key: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    width: int,
    height: int,
    css: str,
    ground: Ground,
) -> str:
    named = [s for s in series if s.css != "thin"]
    direct = css == "wide" and len(named) > 0
    longest = max((min(len(s.name), _label_length(width)) for s in named), default=0)
    right = width - (12 + longest * LABEL_WIDTH if direct else 10)
    left, top, bottom = 50.0, 26.0 + STRIP * ground.strip, height - 40.0
    heights = (
        [v for s in series for v in ([p[1] for p in s.points] + s.low + s.high)]
        if y.low is None
        else [p[1] for s in series for p in s.points]
    )
    heights += [0.0] if ground.zero else []
    heights += [ground.level[0]] if ground.level else []
    x_low, x_high = _domain(x, [p[0] for s in series for p in s.points], 0.0)
    y_low, y_high = _domain(y, heights, 0.08)
    across, up = (
        Scale(low=x_low, high=x_high, start=left, end=right),
        Scale(low=y_low, high=y_high, start=bottom, end=top),
    )
    clip = f"clip-{key}-{css}"
    parts = [
        f'<clipPath id="{clip}"><rect x="{left - 6}" y="{top - 6}" width="{right - left + 12}" '
        f'height="{bottom - top + 12}"/></clipPath>'
    ]
    parts += _behind(ground, across, up)
    parts += _axes(x, y, across, up)
    parts.append(f'<g clip-path="url(#{clip})">')
    for s in sorted(series, key=lambda s: s.css != "thin"):
        parts.append(_series(s, across, up))
    for level, s in enumerate(s for s in series if s.marks):
        foot = bottom - 2 - 9 * level
        d = "".join(f"M{across(x):.1f} {foot:.1f}v-7" for x in s.marks)
        parts.append(f'<path class="event c{s.colour % COLOURS}" d="{d}"/>')
    parts.append("</g>")
    if ground.level is not None:
        parts += _level(*ground.level, across, up)
    if direct:
        parts += _direct_labels(named, across, up, right, top, bottom, _label_length(width))
    parts.append(f'<g class="cursor"><line y1="{top}" y2="{bottom}"/></g>')
    scales = f'data-x="{x_low} {x_high} {left} {right}" data-y="{y_low} {y_high} {bottom} {top}"'
    units = f'data-units="{escape(json.dumps([x.scale, x.unit, x.decimals, y.scale, y.unit, y.decimals]), quote=True)}"'
    label = escape(f"{y.title} against {x.title}: {', '.join(s.name for s in named)}", quote=True)
    return (
        f'<svg class="chart {css}" role="img" aria-label="{label}" viewBox="0 0 {width} {height}" '
        f'data-chart="{escape(key)}" {scales} {units}>{"".join(parts)}</svg>'
    )


def _label_length(width: int) -> int:
    """Characters a direct label may have; longer names are cut."""
    return width // 25


def _axes(x: Axis, y: Axis, across: Scale, up: Scale) -> list[str]:
    parts = []
    values = svg.ticks(up.low / y.scale, up.high / y.scale, 6)
    for value in values:
        at = up(value * y.scale)
        parts.append(f'<line class="grid" x1="{across.start}" x2="{across.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        words = svg.tick_text(value, values[1] - values[0] if len(values) > 1 else 1)
        parts.append(svg.text(across.start - 7, at + 4, words, css="tick", anchor="end"))
    values = svg.ticks(across.low / x.scale, across.high / x.scale, 5 if across.end - across.start > 320 else 4)
    if x.whole:
        values = sorted({float(round(v)) for v in values if across.low <= round(v) * x.scale <= across.high})
    for value in values:
        words = svg.tick_text(value, values[1] - values[0] if len(values) > 1 else 1)
        parts.append(svg.text(across(value * x.scale), up.start + 17, words, css="tick", anchor="middle"))
    parts.append(f'<line class="axis" x1="{across.start}" x2="{across.end:.1f}" y1="{up.start}" y2="{up.start}"/>')
    parts.append(svg.text((across.start + across.end) / 2, up.start + 35, x.title, css="title", anchor="middle"))
    parts.append(svg.text(4, 13, y.title, css="title"))
    return parts


def _behind(ground: Ground, across: Scale, up: Scale) -> list[str]:
    parts = []
    if ground.zero is not None:
        parts += _zero_line(ground.zero, up, across.start, across.end, up.end, up.start)
    for span in ground.spans:
        a, b = across(span.start), across(span.end)
        wide = f'x="{a:.1f}" width="{max(b - a, 0.5):.1f}"'
        parts.append(f'<rect class="shade {span.css}" {wide} y="{up.end}" height="{up.start - up.end:.1f}"/>')
        if not ground.strip:
            continue
        words = f"<title>{escape(f'{span.name}, {span.start:.0f} to {span.end:.0f}')}</title>"
        place = f'y="{up.end - STRIP - 2}" height="{STRIP - 4}"'
        parts.append(f'<rect class="strip {span.css}" {wide} {place}>{words}</rect>')
        if b - a > LABEL_WIDTH * len(span.name) + 6:
            css = f"in-strip {span.css}"
            parts.append(svg.text((a + b) / 2, up.end - STRIP + 11, span.name, css=css, anchor="middle"))
    return parts


def _level(height: float, words: str, across: Scale, up: Scale) -> list[str]:
    at = up(height)
    line = f'<line class="level" x1="{across.start}" x2="{across.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
    return [
        line,
        svg.text(across.end - 4, at - 5 if at - up.end > 16 else at + 13, words, css="side halo", anchor="end"),
    ]


def _zero_line(words: tuple[str, str], up: Scale, left: float, right: float, top: float, bottom: float) -> list[str]:
    """The line y = 0, with the side below it tinted and both sides named."""
    at = up(0.0)
    parts = [
        f'<rect class="better" x="{left}" y="{at:.1f}" width="{right - left:.1f}" height="{bottom - at:.1f}"/>',
        f'<line class="zero" x1="{left}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>',
    ]
    if at - top > 16:
        parts.append(svg.text(left + 6, top + 10, words[0], css="side"))
    if bottom - at > 16:
        parts.append(svg.text(left + 6, bottom - 6, words[1], css="side"))
    return parts


def _series(s: Series, across: Scale, up: Scale) -> str:
    colour = f"c{s.colour % COLOURS}"
    points = [(across(a), up(b)) for a, b in s.points]
    parts = []
    if s.low and s.high:
        xs = [p[0] for p in points]
        upper, lower = [up(v) for v in s.high], [up(v) for v in s.low]
        parts.append(
            svg.band(list(zip(xs, upper, strict=True)), list(zip(xs, lower, strict=True)), css=f"band {colour}")
        )
    parts.append(svg.path(points, css=f"{s.css} {colour}", step=s.step))
    if s.marked:
        parts += [svg.marker(a, b, s.colour, css=f"dot {colour}") for a, b in points]
    return "".join(parts)


def _direct_labels(
    named: Sequence[Series], across: Scale, up: Scale, right: float, top: float, bottom: float, longest: int
) -> list[str]:
    """Each line's name at its right end, joined to it by a hair line where it had to move away."""
    ends = [(across(s.points[-1][0]), min(max(up(s.points[-1][1]), top), bottom)) for s in named]
    places = svg.spread_labels([y for _, y in ends], apart=15, low=top + 4, high=bottom - 2)
    parts = []
    for s, (end_x, end_y), place in zip(named, ends, places, strict=True):
        colour = f"c{s.colour % COLOURS}"
        if abs(place - end_y) > 6 or right - end_x > 14:
            ends_at = f'x1="{end_x + 5:.1f}" y1="{end_y:.1f}" x2="{right + 6:.1f}" y2="{place:.1f}"'
            parts.append(f'<line class="leader {colour}" {ends_at}/>')
        name = s.name if len(s.name) <= longest else s.name[: longest - 1] + "…"
        parts.append(svg.text(right + 10, place + 4, name, css=f"label {colour}"))
    return parts
