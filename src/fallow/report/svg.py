"""The few drawing primitives every chart needs: scales, round ticks, paths, text, and labels that do not overlap.

A plotting library would add megabytes of script to a page that must open without a network; an SVG string needs none,
prints, and takes its colours from the page's style sheet, so one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]


@dataclass(kw_only=True, slots=True)
class Scale:
    """A straight map from data to drawing units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 × 10^n apart) within `[low, high]`."""
    if not high > low:
        return [low]
    rough = (high - low) / max(about, 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(int((high - first * step) / step + 1e-9) + 1)]


def tick_text(value: float, step: float) -> str:
    """`value` with as many decimals as a tick distance of `step` needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if step > 0 and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text.replace(",", "")) != 0 else f"{0:.{decimals}f}"


def coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def path(points: Sequence[Point], *, css: str, step: bool = False) -> str:
    """A polyline; `step` holds each height until the next point."""
    if len(points) < 2:
        return ""
    parts = [f"M{coordinate(points[0][0])} {coordinate(points[0][1])}"]
    for x, y in points[1:]:
        parts.append(f"H{coordinate(x)}V{coordinate(y)}" if step else f"L{coordinate(x)} {coordinate(y)}")
    return f'<path class="{css}" d="{"".join(parts)}"/>'


def band(upper: Sequence[Point], lower: Sequence[Point], *, css: str) -> str:
    """The area between two lines over the same x."""
    outline = [*upper, *reversed(lower)]
    return f'<path class="{css}" d="M{"L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in outline)}Z"/>'


def text(x: float, y: float, words: str, *, css: str, anchor: str = "start") -> str:
    place = f'x="{coordinate(x)}" y="{coordinate(y)}"'
    return f'<text class="{css}" {place} text-anchor="{anchor}">{escape(words)}</text>'


def marker(x: float, y: float, shape: int, *, css: str, size: float = 3.4) -> str:
    """A point whose shape, like its colour, tells the series: circle, square, diamond, triangle, in turn."""
    x_, y_ = coordinate(x), coordinate(y)
    if shape % 4 == 0:
        return f'<circle class="{css}" cx="{x_}" cy="{y_}" r="{size}"/>'
    if shape % 4 == 3:
        d = f"M{x_} {coordinate(y - size * 1.2)}l{size * 1.15:.1f} {size * 2:.1f}h{-size * 2.3:.1f}Z"
        return f'<path class="{css}" d="{d}"/>'
    turn = f' transform="rotate(45 {x_} {y_})"' if shape % 4 == 2 else ""
    side = coordinate(2 * size - 0.8)
    corner = f'x="{coordinate(x - size + 0.4)}" y="{coordinate(y - size + 0.4)}"'
    return f'<rect class="{css}" {corner} width="{side}" height="{side}"{turn}/>'


def spread_labels(heights: Sequence[float], *, apart: float, low: float, high: float) -> list[float]:
    """Heights moved by one sweep down and one up to lie `apart` within `[low, high]`, order kept."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for i in range(len(placed)):
        placed[i] = max(placed[i], low if i == 0 else placed[i - 1] + apart)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high if i == len(placed) - 1 else placed[i + 1] - apart)
    result = [0.0] * len(heights)
    for place, i in zip(placed, order, strict=True):
        result[i] = place
    return result


def thin_out(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: means over equal runs, first and last kept."""
    if len(points) <= most:
        return list(points)
    cuts = [round(i * len(points) / most) for i in range(most + 1)]
    groups = [points[a:b] for a, b in pairwise(cuts)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means[1:-1], points[-1]]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Running mean over `window` points around each, fewer at the ends."""
    half = window // 2
    total = [0.0]
    for _, y in points:
        total.append(total[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        a, b = max(0, i - half), min(len(points), i + half + 1)
        result.append((x, (total[b] - total[a]) / (b - a)))
    return result
