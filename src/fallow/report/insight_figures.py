"""The pictures of one switching run: each line chart over steps, beside it the same layer by layer as a map.

Every chart carries the phases of the run behind its lines, so that one sees at once what a measure did while only
experts were computed. A measure is a mean over layers with the range from the lowest to the highest layer: the mean
alone would hide that first and last layers behave differently. What a chart has no two points for is left out.
"""

from __future__ import annotations

from fallow.report import bars, charts, svg
from fallow.report.charts import Axis, Ground, Series, Span
from fallow.report.figures import HOVER_POINTS, MAP_COLUMNS, Figure
from fallow.report.insight_data import Insight, Rows, mean

CONTROL = 5
"""Colour of what chance would give."""
FEW = 24
"""Up to so many points each has a marker."""


class Drawing:
    """Draws for one run.

    Args:
        key: begins the names of its figures; safe as an id.
        colour: of the arm; the ink (0) is for what is computed or known in full.
    """

    def __init__(self, insight: Insight, *, key: str, colour: int) -> None:
        self.insight, self.key, self.colour = insight, key, colour
        css = {name: f"phase-{name} c{colour % charts.COLOURS}" for name in ("dense", "sparse", "mixed")}
        self.spans = [
            Span(start=phase.start, end=phase.end, name=phase.name, css=css[phase.name]) for phase in insight.phases
        ]

    def figures(self) -> list[Figure]:
        """All but the timeline, in pairs where both are there."""
        found = [*self._similarity(), *self._zeros(), *self._recall(), self._gap(), self._overlap(), *self._dead()]
        return [figure for figure in found if figure is not None]

    def timeline(self) -> Figure | None:
        """Both losses on the watched batch, under a strip of phases."""
        series = []
        for name, field, colour in (("all neurons", "dense_loss", 0), ("only experts", "sparse_loss", self.colour)):
            points = [(float(at.step), v) for at in self.insight.lines if (v := at.seen[field]) is not None]
            series.append(self._line(name, colour, points))
        series[-1].marks = [float(line.step) for line in self.insight.lines if line.anew]
        caption = (
            "The strip says what training steps computed: all neurons (dense), only the experts chosen for a token "
            "(sparse), or both in turn (mixed). Below it, the loss of one fixed held-out batch computed both ways. "
            "Good: the two lines stay together, and both go on falling while the run is sparse. Bad: they part."
        )
        if series[-1].marks and series[-1].points:
            caption += " Ticks above the axis: neurons were sorted into experts."
        return self._chart("timeline", "Loss, and when it was sparse", series, Axis(title="loss (nats)"), caption)

    def _gap(self) -> Figure | None:
        points = [(float(line.step), line.gap) for line in self.insight.lines if line.gap is not None]
        limit = self.insight.threshold("max_gap")
        caption = (
            "Loss computed with only the experts, minus loss computed with all neurons. Good: near the line or below "
            "it, so what the router leaves out is not missed. Bad: rising through a sparse phase."
        )
        level = None
        if limit is not None and points:
            reached = max(y for _, y in points)
            if reached > limit / 3:
                level = (limit, f"limit, {limit:g}")
                caption += " Above the dashed line the run goes back to dense."
            else:
                caption += f" The run would have gone back to dense at {limit:g} nats; it never came near."
        ground = Ground(spans=self.spans, zero=("experts worse", "experts better"), level=level)
        series = [self._line("gap", self.colour, points)]
        y = Axis(title="gap (nats)")
        return self._chart("gap", "What does it cost to compute only experts?", series, y, caption, ground)

    def _similarity(self) -> list[Figure | None]:
        last, end = self.insight.observed("similarity"), self.insight.observed("similarity_end")[:-1]
        level = self.insight.threshold("similarity")
        caption = (
            "Which neurons fire together, compared with the look before and with the last look of all: 1 is the same "
            "pattern, 0 an unrelated one. Good: near 1, then groups of neurons made now still fit later. Low: it is "
            "too early to group, and staying dense is right. Where the line to the last look is low, groups made then "
            "would not fit the finished model."
        )
        if level is not None:
            caption += " Above the dashed line it may switch to sparse."
        ground = Ground(spans=self.spans, level=None if level is None else (level, f"needed to go sparse, {level:g}"))
        series = [self._ranged("look before", self.colour, last)]
        series.append(self._ranged("last look", 0, end, css="line dashed"))
        y = Axis(title="similarity", decimals=2)
        words = "Similarity with the look before. Faint rows are layers whose pattern still changes."
        return [
            self._chart("similarity", "Do the same neurons still fire together?", series, y, caption, ground),
            self._map("similarity", "The same, layer by layer", last, words),
        ]

    def _zeros(self) -> list[Figure | None]:
        rows = self.insight.observed("zeros")
        level = self.insight.threshold("zeros")
        caption = (
            "Share of the feed-forward activations that are exactly zero: work that could be left out. Line: mean over "
            "layers; shade: lowest to highest layer. Good: high, and rising."
        )
        share = self.insight.active_share
        if share is not None and rows:
            firing = 1 - mean(rows[-1][1])
            caption += (
                f" At the last look {firing:.0%} of the neurons fired for a token; sparse steps compute {share:.0%}"
            )
            caption += (
                ", so some that fire are left out." if firing > share else ", enough for all of them, if well grouped."
            )
        ground = Ground(spans=self.spans, level=None if level is None else (level, f"needed to go sparse, {level:.0%}"))
        y = Axis(title="zeros (%)", scale=0.01, unit="%", decimals=1)
        words = "Share of zeros. Strong rows are layers that have most to leave out."
        return [
            self._chart("zeros", "How much is zero?", [self._ranged("zeros", self.colour, rows)], y, caption, ground),
            self._map("zeros", "Zeros, layer by layer", rows, words),
        ]

    def _recall(self) -> list[Figure | None]:
        seen, best = self.insight.observed("recall"), self.insight.observed("oracle")
        made = self.insight.parted
        series = [
            self._mean("best choice", 0, _in_turn(best, made("oracle"))),
            self._mean("router", self.colour, _in_turn(seen, made("recall"))),
            self._mean("random groups", CONTROL, made("random_recall"), css="line dashed"),
        ]
        series[-1].marked = True
        caption = (
            "Share of the feed-forward output that the computed experts hold (recall). The router guesses from the "
            "layer’s input; the best choice knows the output; random groups is a router over neurons grouped by "
            "chance, the control. Good: the router close below the best choice, both far above random groups. A best "
            "choice that is itself low means that the groups do not match what fires together."
        )
        if len(made("recall")) > 1:
            caption += " Jumps: neurons were sorted anew."
        if seen and best:
            caption += (
                f" At the last look the router kept {mean(seen[-1][1]):.0%}, the best choice {mean(best[-1][1]):.0%}."
            )
        y = Axis(title="output kept (%)", scale=0.01, low=0.0, high=1.0, unit="%", decimals=1)
        most = dict(best)
        hit = [
            (step, [a / b if b > 0 else 0.0 for a, b in zip(found, most[step], strict=True)])
            for step, found in seen
            if len(most.get(step, ())) == len(found)
        ]
        words = "The router’s share over that of the best choice. Faint rows are layers whose router misses more."
        return [
            self._chart("recall", "Does the router find the right experts?", series, y, caption),
            self._map("router", "Router against best choice, layer by layer", hit, words),
        ]

    def _overlap(self) -> Figure | None:
        series = [
            self._ranged("same group", self.colour, self.insight.parted("overlap")),
            self._ranged("noise floor", CONTROL, self.insight.parted("noise_floor"), css="line dashed"),
        ]
        if not series[0].points:
            return None
        for s in series:
            s.marked = True
        last = [f"{100 * s.points[-1][1]:.0f}%" for s in series if s.points]
        caption = (
            "Each time neurons are sorted into experts: the share that stays in the same group. The noise floor is "
            "what two sortings of the very same weights agree on that start from other random draws. Far "
            "above it, the groups last. At or below it, they changed as much as another throw of the dice would have "
            "changed them, and sorting anew brought no news. "
        )
        caption += f"At the last sorting {' against a noise floor of '.join(last)}."
        y = Axis(title="neurons that stay (%)", scale=0.01, low=0.0, high=1.0, unit="%", decimals=1)
        return self._chart("overlap", "Do the groups last?", series, y, caption)

    def _dead(self) -> list[Figure | None]:
        rows = self.insight.observed("dead")
        caption = "Share of neurons that fire for no token of the batch. Good: low, and not rising. "
        if rows:
            values = rows[-1][1]
            most = max(values)
            where = f", {most:.1%} in layer {values.index(most) + 1}" if len(values) > 1 and most > 0 else ""
            caption += f"At the last look {mean(values):.1%} of all{where}. "
        caption += "Dead neurons make the zeros look better than they are: they are capacity that nothing uses."
        y = Axis(title="dead neurons (%)", scale=0.01, low=0.0, unit="%", decimals=1)
        y.high = max(0.02, 1.08 * max((max(values) for _, values in rows), default=0.0))
        return [
            self._chart("dead", "Neurons that never fire", [self._ranged("dead", self.colour, rows)], y, caption),
            self._map("dead", "Dead neurons, layer by layer", rows, "Strong cells: many neurons fire for no token."),
        ]

    # -- parts --------------------------------------------------------------------------------------------------------

    def _line(self, name: str, colour: int, points: list[svg.Point]) -> Series:
        return Series(name=name, colour=colour, points=svg.thin_out(points, HOVER_POINTS), marked=len(points) <= FEW)

    def _mean(self, name: str, colour: int, rows: Rows, *, css: str = "line") -> Series:
        series = self._line(name, colour, [(float(step), mean(values)) for step, values in rows])
        series.css = css
        return series

    def _ranged(self, name: str, colour: int, rows: Rows, *, css: str = "line") -> Series:
        kept = _every(rows, HOVER_POINTS)
        series = self._mean(name, colour, kept, css=css)
        if any(len(values) > 1 for _, values in kept):
            series.low, series.high = [min(v) for _, v in kept], [max(v) for _, v in kept]
        return series

    def _chart(
        self, key: str, title: str, series: list[Series], y: Axis, caption: str, ground: Ground | None = None
    ) -> Figure | None:
        series = [s for s in series if s.points]
        if not any(len(s.points) > 1 for s in series):
            return None
        key, wide = f"{self.key}-{key}", key == "timeline"
        ground = ground or Ground(spans=self.spans, strip=wide)
        x = Axis(title="step", low=0.0, high=float(self.insight.steps), unit="steps", decimals=0)
        return Figure(
            key=key, title=title, body=charts.line_chart(key, series, x, y, full=wide, ground=ground), caption=caption
        )

    def _map(self, key: str, title: str, rows: Rows, words: str) -> Figure | None:
        layers = max((len(values) for _, values in rows), default=0)
        rows = [row for row in rows if len(row[1]) == layers]
        if len(rows) < 2 or layers < 2:
            return None
        kept = _every(rows, MAP_COLUMNS)
        steps, columns = [step for step, _ in kept], [values for _, values in kept]
        low, top = min(map(min, columns)), max(map(max, columns))
        if top - low < 0.005:
            said = f"<b>{100 * top:.3g}%</b> in each of {layers} layers, from step {steps[0]} to {steps[-1]}."
            body, caption = f'<p class="same">{said}</p>', ""
        else:
            body = bars.layer_map(title, self.colour, steps, columns, top=top, what=key, low=low, tall=True)
            caption = f"{words} First layer on top; the faintest is {low:.0%}, full colour {top:.0%}."
        return Figure(key=f"{self.key}-{key}-layers", title=title, body=body, caption=caption)


def _in_turn(seen: Rows, made: Rows) -> Rows:
    """Looks, and at steps where neurons were sorted anew first what was and then what is."""
    return sorted([*seen, *made], key=lambda row: row[0])


def _every(rows: Rows, most: int) -> Rows:
    """At most `most` rows, evenly, the last one kept."""
    stride = -(-len(rows) // most)
    return rows[::stride][:-1] + rows[-1:] if stride > 1 else rows
