"""A map of layers (rows, first on top) against lengths (columns): which layer brings back or costs what, and where.

Shade is a value's share of the map's largest, so that the two maps of a diagnosis, drawn on one scale, can be compared;
values at or below zero are left blank. The leading layer is framed. Every cell says its own value on hover.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fallow.report import svg
from fallow.report.charts import COLOURS


def heat_map(
    name: str,
    columns: Sequence[tuple[str, Sequence[float]]],
    *,
    colour: int,
    top: float,
    leader: int | None = None,
    unit: str = "nats",
) -> str:
    """An SVG.

    Args:
        name: for those who cannot see it.
        columns: (heading, one value per layer) of each column.
        colour: of the style sheet's series.
        top: the value in full colour.
        leader: the layer to frame.
        unit: of the values.
    """
    layers = len(columns[0][1])
    row = min(16.0, max(8.0, 300.0 / layers))
    left, upper, right = 50.0, 24.0, 424.0
    lower = upper + layers * row
    across = (right - left) / len(columns)
    parts = []
    for number, (heading, values) in enumerate(columns):
        x = left + number * across
        parts.append(svg.text(x + across / 2, upper - 8, heading, css="tick", anchor="middle"))
        for layer, value in enumerate(values):
            share = min(1.0, max(0.0, value / top)) if top > 0 else 0.0
            words = escape(f"layer {layer}, {heading} tokens: {value:+.4f} {unit}")
            place = f'x="{x:.1f}" y="{upper + layer * row:.1f}" width="{across - 1:.1f}" height="{row - 1:.1f}"'
            parts.append(
                f'<rect class="cell c{colour % COLOURS}" fill-opacity="{0.04 + 0.96 * share:.2f}" {place}>'
                f"<title>{words}</title></rect>"
            )
    every = 1 if row >= 13 else 5
    for layer in range(layers):
        if layer % every == 0 or layer == leader:
            words = str(layer)
            css = "label" if layer == leader else "tick"
            parts.append(svg.text(left - 6, upper + (layer + 0.5) * row + 4, words, css=css, anchor="end"))
    if leader is not None:
        place = (
            f'x="{left - 1.5}" y="{upper + leader * row - 1.5:.1f}" width="{right - left + 2}" height="{row + 2:.1f}"'
        )
        parts.append(f'<rect class="frame" fill="none" stroke="currentColor" stroke-width="1.6" {place}/>')
    middle = (upper + lower) / 2
    parts.append(
        f'<text class="title" text-anchor="middle" transform="rotate(-90 10 {middle:.0f})" x="10" y="{middle + 4:.0f}">'
        "layer</text>"
    )
    parts.append(svg.text((left + right) / 2, lower + 18, "tokens of the document", css="title", anchor="middle"))
    label = escape(name, quote=True)
    return f'<svg class="map" role="img" aria-label="{label}" viewBox="0 0 430 {lower + 24:.0f}">{"".join(parts)}</svg>'
