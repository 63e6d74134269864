"""Stacked bars of where time or memory went, per arm, the map of layers over steps, and columns by layer.

The bars are HTML rather than SVG so that their text keeps its size on a phone; the map is one small drawing whose cells
of equal shade share a path, because a rectangle per layer and step would weigh megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from fallow.report import svg
from fallow.report.charts import COLOURS


def stacked_bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]],
    *,
    amount: Callable[[float], str],
    swatches: Mapping[str, str],
    inside: Callable[[float, float], str],
) -> str:
    """One bar per row `(name, [(part, value)…], total in words)`, on a common scale, as HTML: text keeps its size.

    Args:
        rows: every row with the same parts in the same order.
        amount: a value in words.
        swatches: each part's class of the style sheet.
        inside: what stands in a part, from its value and its share of the row.
    """
    longest = max((sum(value for _, value in parts) for _, parts, _ in rows), default=0.0)
    if longest <= 0:
        return '<p class="empty">None of this was logged.</p>'
    lines = []
    for name, parts, total in rows:
        whole = sum(value for _, value in parts)
        cells = []
        for part, value in parts:
            share = value / whole if whole else 0.0
            if value <= 0:
                continue
            words = escape(f"{part}: {amount(value)}, {share:.1%}", quote=True)
            text = inside(value, share)
            tight = "" if value / longest > 0.13 else ' class="tight"'
            fits = value / longest > 0.0125 * len(text) + 0.018
            shown = f"<span{tight}>{escape(text)}</span>" if fits else ""
            width = f"width:{100 * value / longest:.3f}%"
            cells.append(f'<i class="{swatches[part]}" style="{width}" title="{words}">{shown}</i>')
        lines.append(
            f'<div class="bar-name">{escape(name)}</div><div class="bar" role="img" aria-label="{escape(name)}: '
            f'{escape(", ".join(f"{p} {amount(v)}" for p, v in parts if v > 0))}">{"".join(cells)}'
            f"<b>{escape(total)}</b></div>"
        )
    used = [part for part, _ in rows[0][1] if any(dict(parts).get(part, 0.0) > 0 for _, parts, _ in rows)]
    legend = "".join(f'<li><i class="swatch {swatches[part]}"></i>{escape(part)}</li>' for part in used)
    return f'<ul class="legend">{legend}</ul><div class="bars">{"".join(lines)}</div>'


def layer_map(
    name: str,
    colour: int,
    steps: Sequence[int],
    columns: Sequence[Sequence[float]],
    *,
    top: float,
    what: str,
    low: float = 0.0,
    tall: bool = False,
    across_title: str = "step",
) -> str:
    """A rate per layer (rows, first layer on top) over steps (columns); `top` is the rate drawn in full colour, `low`
    the one drawn faintest, `what` names the rate; `tall` fills the height of a chart beside it; `across_title` says
    what `steps` count where they are no steps.

    Cells of one shade are one path, so that 30 layers × 48 columns cost a few kilobytes.
    """
    layers = len(columns[0])
    width, height = 430.0, 46.0 + (200.0 if tall else max(110.0, min(layers * 7.0, 220.0)))
    left, upper, right, lower = 34.0, 8.0, width - 4, height - 34
    across, down = (right - left) / len(columns), (lower - upper) / layers
    shades: dict[int, list[str]] = {}
    for layer in range(layers):
        start = 0
        levels = [round(20 * (column[layer] - low) / (top - low)) if top > low else 0 for column in columns]
        for end in range(1, len(columns) + 1):
            if end == len(columns) or levels[end] != levels[start]:
                # Absolute corners: neighbours round to the same edge, so no seam shows between them.
                x, y = left + start * across, upper + layer * down
                x_end, y_end = left + end * across, y + down
                cell = f"M{x:.1f} {y:.1f}H{x_end:.1f}V{y_end:.1f}H{x:.1f}Z"
                shades.setdefault(levels[start], []).append(cell)
                start = end
    paths = "".join(
        f'<path class="cell c{colour % COLOURS}" fill-opacity="{0.06 + 0.94 * level / 20:.2f}" d="{"".join(cells)}">'
        f"<title>{escape(what)} {low + (top - low) * level / 20:.0%}</title></path>"
        for level, cells in sorted(shades.items())
    )
    marks = [
        svg.text(left - 6, upper + 10, "1", css="tick", anchor="end"),
        svg.text(left - 6, lower - 1, str(layers), css="tick", anchor="end"),
        svg.text(left, lower + 15, f"{steps[0]:,}", css="tick"),
        svg.text(right, lower + 15, f"{steps[-1]:,}", css="tick", anchor="end"),
        svg.text((left + right) / 2, lower + 27, across_title, css="title", anchor="middle"),
        f'<text class="title" text-anchor="middle" transform="rotate(-90 10 {(upper + lower) / 2:.0f})" x="10" '
        f'y="{(upper + lower) / 2 + 4:.0f}">layer</text>',
    ]
    label = escape(f"{name}: {what} per layer and {across_title}", quote=True)
    return (
        f'<svg class="map" role="img" aria-label="{label}" viewBox="0 0 {width:.0f} {height:.0f}">'
        f"{paths}{''.join(marks)}</svg>"
    )


def layer_columns(name: str, colour: int, values: Sequence[float], *, top: float, unit: str) -> str:
    """One column per layer, the first at the left, `top` filling the height; whole numbers, said over their columns
    where they fit."""
    width, height = 430.0, 246.0
    left, upper, right, lower = 40.0, 22.0, width - 4, height - 36
    across = (right - left) / len(values)
    wide = min(across * 0.72, 46.0)
    up = svg.Scale(low=0.0, high=top, start=lower, end=upper)
    parts = []
    for value in svg.ticks(0.0, top, 4):
        at = up(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(svg.text(left - 6, at + 4, f"{value:.0f}", css="tick", anchor="end"))
    every = -(-len(values) // 10)
    for number, value in enumerate(values, start=1):
        middle = left + (number - 0.5) * across
        place = f'x="{middle - wide / 2:.1f}" width="{wide:.1f}" y="{up(value):.1f}" height="{lower - up(value):.1f}"'
        words = f"<title>{escape(f'layer {number}: {value:.0f} {unit}')}</title>"
        parts.append(f'<rect class="cell c{colour % COLOURS}" {place}>{words}</rect>')
        if across > 19:
            parts.append(svg.text(middle, up(value) - 5, f"{value:.0f}", css="tick", anchor="middle"))
        if number % every == 0 or number == 1:
            parts.append(svg.text(middle, lower + 15, str(number), css="tick", anchor="middle"))
    parts.append(svg.text((left + right) / 2, lower + 31, "layer", css="title", anchor="middle"))
    parts.append(svg.text(4, 11, unit, css="title"))
    label = escape(f"{name}: {unit} by layer", quote=True)
    view = f'viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg class="map" role="img" aria-label="{label}" {view}>{"".join(parts)}</svg>'
