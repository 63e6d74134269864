"""The pictures of one upcycled run: what serving it sparse costs over the run, and which layers its predictor serves.

Losses are on the held-out text, dense companion beside both modes. What was looked at on the watched batch is drawn by
layer, first look against last, because a mean over layers would hide the one that fails; chance stands beside it. What
a chart has no two points for is left out.
"""

from __future__ import annotations

from fallow.report import bars, charts, svg
from fallow.report.analysis import WIDEST_READING, Arm, interpolate
from fallow.report.charts import Axis, Ground, Series
from fallow.report.figures import HOVER_POINTS, MAP_COLUMNS, Figure, pooled
from fallow.report.insight_data import Rows, mean
from fallow.report.loading import number
from fallow.report.upcycle_data import Layers, Upcycled

CONTROL = 5
"""Colour of what chance would give."""
DENSE_MODE = 3
"""Colour of the same weights with all channels."""
FEW = 24
"""Up to so many points each has a marker."""


class Drawing:
    """Draws for one arm.

    Args:
        run: what its first run wrote.
        arm: it, with all repeats.
        baseline: the dense companion.
        key: begins the names of its figures; safe as an id.
        colour: of the arm; the ink (0) is the companion's.
    """

    def __init__(self, run: Upcycled, arm: Arm, baseline: Arm | None, *, key: str, colour: int) -> None:
        self.run, self.arm, self.baseline, self.key, self.colour = run, arm, baseline, key, colour
        self.own = 1 if colour in (DENSE_MODE, CONTROL) else colour
        last = arm.runs[0].evals[-1] if arm.runs[0].evals else {}
        self.per_step = (number(last, "tokens") or 1.0) / (number(last, "step") or 1.0)

    def figures(self) -> list[Figure]:
        """All but those of the first stage."""
        found = [self.losses(), self.gaps(), self.recall(), self.keep(), self.entropy(), self.dead()]
        return [figure for figure in found if figure is not None]

    # -- over the run -------------------------------------------------------------------------------------------------

    def losses(self) -> Figure | None:
        ours, whole = self._curve(self.arm, "loss"), self._curve(self.arm, "dense_loss")
        if len(ours) < 2:
            return None
        series = [
            self._line("sparse" if whole else "all channels", self.own, ours),
            self._line("all channels", DENSE_MODE, whole, css="line dashed"),
        ]
        caption = (
            f"Loss on held-out text. Sparse: {self.run.kept} channels, as the model is served. All channels: the same "
            "weights, nothing left out."
        )
        if self.baseline is not None:
            series.append(self._line(self.baseline.label, 0, self._curve(self.baseline, "loss")))
            caption += f" {self.baseline.label}: trained on the same text without sparsity. Good: all three end close."
        return self._chart(
            "losses", "Loss, sparse and dense", series, self._steps(), Axis(title="loss (nats)"), caption
        )

    def gaps(self) -> Figure | None:
        """The gap to the companion, and the part of it that comes of leaving channels out."""
        theirs = self._curve(self.baseline, "loss") if self.baseline is not None else []
        ours, whole = self._curve(self.arm, "loss"), dict(self._curve(self.arm, "dense_loss"))
        left_out = [(at, loss - whole[at]) for at, loss in ours if at in whole]
        gap = [
            (at, loss - there)
            for at, loss in ours
            if (there := interpolate(theirs, at, widest=WIDEST_READING)) is not None
        ]
        name = self.baseline.label if self.baseline is not None else ""
        series = [
            self._line(f"to {name}", self.own, gap),
            self._line("to all channels", DENSE_MODE, left_out, css="line dashed"),
        ]
        caption = ""
        if gap:
            caption = f"Loss served sparse, minus {name}’s after as many tokens: what the reader of the model pays. "
        caption += (
            "To all channels: minus the loss of the same weights with nothing left out. Good: both fall; the weights "
            "learn to do without."
        )
        ground = Ground(zero=("sparse worse", "sparse better"))
        y = Axis(title="gap (nats)")
        return self._chart("gaps", "What does leaving channels out cost?", series, self._steps(), y, caption, ground)

    def _curve(self, arm: Arm, name: str) -> list[svg.Point]:
        """Held-out loss against steps of this arm: other arms' tokens are counted in them."""
        points, _, _ = pooled(arm.runs, "evals", "tokens", lambda _, line: number(line, name))
        return [(at / self.per_step, loss) for at, loss in points]

    def _steps(self) -> Axis:
        return Axis(title="step", low=0.0, unit="steps", decimals=0)

    # -- by layer -----------------------------------------------------------------------------------------------------

    def recall(self) -> Figure | None:
        chance = self.run.by_layer(-1, "random")
        caption = (
            f"Of what the best {self.run.kept} channels contribute, the share that the chosen ones contribute "
            "(recall), on one watched held-out batch. Good: near 100% in every layer, and far above chance; a layer "
            "that falls behind is where to look first."
        )
        if chance:
            caption += f" Chance: as many channels drawn at random; {mean([v for _, v in chance]):.0%} over all layers."
        y = Axis(title="recall (%)", scale=0.01, low=0.0, high=1.0, unit="%", decimals=1)
        return self._layers("recall", "Does the predictor find the best channels?", y, caption, chance=chance)

    def entropy(self) -> Figure | None:
        values = [v for which in (0, -1) for _, v in self.run.by_layer(which, "entropy")]
        caption = (
            "How evenly the channels of a bank take turns over the batch (entropy): 100% is each as often as the next. "
            "Low: the same few win for every token, and the rest of the bank is hardly ever used."
        )
        low = max(0.0, 1 - 1.3 * max(0.04, 1 - min(values, default=1.0)))
        y = Axis(title="evenness (%)", scale=0.01, low=low, high=1.0, unit="%", decimals=1)
        return self._layers("entropy", "Are all channels used?", y, caption)

    def dead(self) -> Figure | None:
        both = [self.run.by_layer(which, "dead") for which in (0, -1)]
        values = [value for layers in both for _, value in layers]
        title = "Channels that no token chose"
        if values and max(values) == 0:
            words = f'<p class="same"><b>None</b>, in {len(both[1])} layers, at every look.</p>'
            return Figure(key=f"{self.key}-dead", title=title, body=words)
        caption = (
            "Share of channels that no token of the watched batch chose (dead). Good: low, and not rising: a dead "
            "channel is capacity that serving never reaches."
        )
        y = Axis(title="dead channels (%)", scale=0.01, low=0.0, unit="%", decimals=1)
        y.high = max(0.02, 1.08 * max(values, default=0.0))
        return self._layers("dead", title, y, caption)

    def keep(self) -> Figure | None:
        """None where every layer keeps as many."""
        keep = self.run.keep
        if len(set(keep)) < 2:
            return None
        top = self.run.bank or max(keep)
        body = bars.layer_columns("Kept", self.own, keep, top=top, unit=f"channels kept in every bank of {top:.0f}")
        caption = f"{mean(keep):.3g} of {top:.0f} in the mean. A layer that keeps more is read more, and loses less."
        return Figure(key=f"{self.key}-keep", title="How much does each layer keep?", body=body, caption=caption)

    def _layers(self, name: str, title: str, y: Axis, caption: str, *, chance: Layers | None = None) -> Figure | None:
        """First look against last, layer by layer."""
        first, last = self.run.looked(0, name), self.run.looked(-1, name)
        series = [self._by_layer(f"last look, step {last}", self.own, self.run.by_layer(-1, name))]
        if first != last:
            series.append(
                self._by_layer(f"first, step {first}", DENSE_MODE, self.run.by_layer(0, name), css="line dashed")
            )
        if chance:
            series.append(self._by_layer("chance", CONTROL, chance, css="line dashed"))
        most = max((layer for s in series for layer, _ in s.points), default=1.0)
        x = Axis(title="layer, from the input up", low=0.5, high=most + 0.5, unit="", decimals=0, whole=True)
        return self._chart(name, title, series, x, y, caption)

    def _by_layer(self, name: str, colour: int, values: Layers, *, css: str = "line") -> Series:
        return self._line(name, colour, [(float(layer), value) for layer, value in values], css=css)

    # -- the first stage ----------------------------------------------------------------------------------------------

    def fits(self) -> list[Figure]:
        """Recall while predictors were fitted, over tokens and layer by layer."""
        recall, loss = self.run.fitted("recall"), self.run.fitted("loss")
        rows = recall[:: -(-len(recall) // HOVER_POINTS)] if recall else []
        series = self._line("recall", self.own, [(float(at), mean(values)) for at, values in rows])
        if any(len(values) > 1 for _, values in rows):
            series.low, series.high = [min(v) for _, v in rows], [max(v) for _, v in rows]
        caption = (
            "Before training, predictors alone were fitted to the frozen model. Recall on text they had not seen: mean "
            "over layers, shade from the lowest to the highest layer. Good: rising, and flat at the end; still "
            "rising: more fit_tokens would help."
        )
        if len(loss) > 1:
            caption += f" Their loss went from {mean(loss[0][1]):.3g} to {mean(loss[-1][1]):.3g}."
        x = Axis(title="tokens fitted on", low=0.0, unit="tokens", decimals=0)
        y = Axis(title="recall (%)", scale=0.01, unit="%", decimals=1)
        chart = self._chart("fit", "First stage: fitting the predictors", [series], x, y, caption)
        found = [chart, self._map("First stage, layer by layer", recall)]
        return [figure for figure in found if figure is not None]

    def _map(self, title: str, rows: Rows) -> Figure | None:
        layers = max((len(values) for _, values in rows), default=0)
        rows = [row for row in rows if len(row[1]) == layers]
        if len(rows) < 2 or layers < 2:
            return None
        kept = rows[:: -(-len(rows) // MAP_COLUMNS)]
        columns = [values for _, values in kept]
        low, top = min(map(min, columns)), max(map(max, columns))
        body = bars.layer_map(
            title, self.own, [at for at, _ in kept], columns, top=top, what="recall", low=low, tall=True,
            across_title="tokens fitted on",
        )  # fmt: skip
        caption = (
            f"Recall. First layer on top; the faintest is {low:.0%}, full colour {top:.0%}. Faint rows: layers whose "
            "predictor needs more text, or more rank."
        )
        return Figure(key=f"{self.key}-fit-layers", title=title, body=body, caption=caption)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _line(self, name: str, colour: int, points: list[svg.Point], *, css: str = "line") -> Series:
        points = svg.thin_out(points, HOVER_POINTS)
        return Series(name=name, colour=colour, points=points, marked=len(points) <= FEW, css=css)

    def _chart(
        self,
        name: str,
        title: str,
        series: list[Series],
        x: Axis,
        y: Axis,
        caption: str,
        ground: Ground | None = None,
    ) -> Figure | None:
        series = [s for s in series if s.points]
        if not any(len(s.points) > 1 for s in series):
            return None
        key = f"{self.key}-{name}"
        body = charts.line_chart(key, series, x, y, ground=ground)
        return Figure(key=key, title=title, body=body, caption=caption)
