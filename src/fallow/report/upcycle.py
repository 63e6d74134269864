"""The section on upcycled runs: what a token reads less, what that costs in loss, and which layers choose well.

Such a model gains when it is served, which training does not measure: so the section says what was bought in bytes and
paid in nats, side by side for all arms, controls among them, and names the commands that measure speed. Each arm then
has a block of figures and pictures (`upcycle_figures`). Of repeats that differ in their seed the first is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from fallow.report import figures, wording
from fallow.report.analysis import Arm, Comparison
from fallow.report.figures import Figure
from fallow.report.insight_data import mean
from fallow.report.upcycle_data import Upcycled, read
from fallow.report.upcycle_figures import Drawing
from fallow.report.view import NONE, Cell, Facts, Row

BOUGHT = [
    "Keeps",
    "Bytes per token",
    "Loss, sparse",
    "Loss, all channels",
    "Gap to dense",
    "Recall",
]
LAYER_COLUMNS = [
    ("keep", "keeps", ".0f"),
    ("recall first", "recall, first look", ".1%"),
    ("recall", "recall, last look", ".1%"),
    ("random", "recall by chance", ".1%"),
    ("found", "best channels chosen", ".1%"),
    ("entropy", "evenness", ".1%"),
    ("dead", "dead channels", ".1%"),
]
"""Of the table by layer: measure, heading, format."""


@dataclass(kw_only=True, slots=True)
class Block:
    """One arm's."""

    arm: str
    label: str
    sentence: str
    cards: list[Cell]
    charts: list[Figure]
    first_stage: list[Figure]
    layers: Facts | None
    """Every layer in figures."""
    aside: bool
    """A control."""

    @property
    def figures(self) -> list[Figure]:
        return [*self.charts, *self.first_stage]


@dataclass(kw_only=True, slots=True)
class Section:
    """All arms'."""

    bought: Facts
    blocks: list[Block]
    opened: int
    """Which block is open: the headline's arm, else the first."""


def section(comparison: Comparison, *, first: str) -> Section | None:
    """None where no arm is upcycled; `first` is the arm whose block is open."""
    palette = figures.colours(comparison)
    held = [(arm, run) for arm in comparison.arms if (run := read(arm.runs[0])) is not None]
    if not held:
        return None
    found = []
    for number_, (arm, run) in enumerate(held):
        base = comparison.baseline if comparison.baseline is not arm else None
        drawing = Drawing(run, arm, base, key=f"upcycle{number_}", colour=palette[arm.name])
        found.append(
            Block(
                arm=arm.name,
                label=arm.label,
                sentence=_sentence(arm, run, base),
                cards=_cards(arm, run),
                charts=drawing.figures(),
                first_stage=drawing.fits(),
                layers=_by_layer(run),
                aside=arm.aside,
            )
        )
    names = [block.arm for block in found]
    opened = names.index(first) if first in names else 0
    return Section(bought=_bought(held, comparison.baseline), blocks=found, opened=opened)


def key_figures(comparison: Comparison, name: str) -> list[Cell] | None:
    """The big numbers under a headline about arm `name`; None where that arm is not upcycled."""
    arm = next((arm for arm in comparison.arms if arm.name == name), None)
    run = read(arm.runs[0]) if arm is not None else None
    if arm is None or run is None:
        return None
    found = [cell for cell in (_read_cell(run),) if cell]
    if arm.gap_tokens and comparison.baseline is not None:
        result = wording.outcome(arm.gap_tokens)
        word = {"won": "below", "lost": "above"}.get(result, "level with")
        css = {"won": "good", "lost": "bad"}.get(result, "")
        note = f"nats of loss at equal tokens, served sparse: {word} {comparison.baseline.label}"
        found.append(Cell(value=wording.signed(arm.gap_tokens.mean), note=note, css=css))
    left_out = _left_out(arm)
    if left_out is not None:
        found.append(Cell(value=wording.signed(left_out), note="nats against the same weights with all channels"))
    if arm.ratio and comparison.baseline is not None:
        note = f"the tokens per second of {comparison.baseline.label} in training, where it saves nothing"
        found.append(Cell(value=wording.times(arm.ratio.mean), note=note))
    return found


# -- words ------------------------------------------------------------------------------------------------------------


def _sentence(arm: Arm, run: Upcycled, base: Arm | None) -> str:
    text = (
        f"For every token, {arm.label} computes {run.kept} channels of each feed-forward layer, chosen {run.chooser}."
    )
    if arm.aside:
        text += " That is a control: nothing is served so."
    if arm.loss is None:
        return text + " No held-out loss was measured yet."
    if arm.dense_loss is None:
        return (
            text + f" Its held-out loss is {wording.loss(arm.loss.mean)} with all channels; sparse it was not measured."
        )
    before = arm.runs[0].evals[0]
    text += f" Computed so, its held-out loss is {wording.loss(arm.loss.mean)}"
    if before is not arm.runs[0].evals[-1]:
        text += f" (before training {wording.loss(before['loss'])})"
    text += f"; with all channels the same weights reach {wording.loss(arm.dense_loss.mean)}."
    if base is not None and base.loss is not None:
        text += f" Its companion {base.label}, trained without sparsity, ended at {wording.loss(base.loss.mean)}"
        gap = arm.gap_tokens
        text += f": a gap of {wording.signed(gap.mean)} nats at equal tokens." if gap else "."
    if run.fits:
        text += (
            f" Its predictors were first fitted on {wording.tokens(run.fits[-1]['tokens'])} tokens, the model frozen."
        )
    if len(arm.runs) > 1:
        text += f" Losses are means over {len(arm.runs)} seeds; pictures by layer are of the first."
    return text


def _cards(arm: Arm, run: Upcycled) -> list[Cell]:
    found = [cell for cell in (_read_cell(run),) if cell]
    left_out = _left_out(arm)
    if left_out is not None and arm.loss and arm.dense_loss:
        note = (
            f"nats by leaving channels out: {wording.loss(arm.loss.mean)} sparse, {wording.loss(arm.dense_loss.mean)}"
        )
        note += " with all of them"
        start = arm.runs[0].evals[0]
        if start is not arm.runs[0].evals[-1]:
            note += f"; before training {wording.signed(start['loss'] - start['dense_loss'])}"
        found.append(Cell(value=wording.signed(left_out), note=note))
    recall, chance = run.by_layer(-1, "recall"), run.by_layer(-1, "random")
    if recall:
        note = "of what the best channels contribute is in the chosen ones (recall), at the last look"
        if chance and not arm.aside:
            note += f"; chance finds {mean([v for _, v in chance]):.0%}"
        found.append(Cell(value=f"{mean([v for _, v in recall]):.0%}", note=note))
        layer, least = min(recall, key=lambda pair: pair[1])
        if len(recall) > 1:
            found.append(Cell(value=f"{least:.0%}", note=f"recall in the worst layer, number {layer} of {len(recall)}"))
    return found


def _read_cell(run: Upcycled) -> Cell | None:
    """What decoding a token reads of the FFNs."""
    if run.living is None:
        return None
    if run.reads is None:
        return Cell(value=f"{run.living:.0%}", note="of the feed-forward channels live for a token")
    return Cell(value=f"{run.reads:.0%}", note=f"of the feed-forward bytes read per token: {run.parts}")


def _left_out(arm: Arm) -> float | None:
    """Nats between both modes of the same weights."""
    return arm.loss.mean - arm.dense_loss.mean if arm.loss and arm.dense_loss else None


# -- tables -----------------------------------------------------------------------------------------------------------


def _bought(held: list[tuple[Arm, Upcycled]], base: Arm | None) -> Facts:
    """Bytes bought and nats paid, an arm a row, the companion first."""
    columns = [name if name != "Gap to dense" or base is None else f"Gap to {base.label}" for name in BOUGHT]
    table = Facts(title="What was bought, and for what", columns=columns)
    if base is not None and base.loss is not None and all(base is not arm for arm, _ in held):
        loss = Cell(value=wording.loss(base.loss.mean))
        cells = [Cell(value="all"), Cell(value="100%"), Cell(value=NONE), loss, Cell(value=NONE), Cell(value=NONE)]
        table.rows.append(Row(name=base.label, cells=cells))
    for arm, run in held:
        recall, chance = run.by_layer(-1, "recall"), run.by_layer(-1, "random")
        if run.reads is not None:
            stand_in = f" + {run.compensation:.1%} compensation" if run.compensation else ""
            own = f"{run.living:.0%} + {run.predictor:.1%} predictor{stand_in}"
            read_ = Cell(value=f"{run.reads:.0%}", note=own)
        else:
            read_ = Cell(value=NONE, note="control" if arm.aside else "")
        whole = arm.dense_loss if arm.dense_loss else arm.loss
        gap = arm.gap_tokens if arm.dense_loss else None
        css = {"won": "good", "lost": "bad"}.get(wording.outcome(gap), "") if not arm.aside else ""
        cells = [
            Cell(value=run.kept),
            read_,
            Cell(value=wording.loss(arm.loss.mean) if arm.loss and arm.dense_loss else NONE),
            Cell(value=wording.loss(whole.mean) if whole else NONE),
            Cell(value=wording.signed(gap.mean) if gap else NONE, css=css),
            Cell(
                value=f"{mean([v for _, v in recall]):.0%}" if recall else NONE,
                note=f"chance {mean([v for _, v in chance]):.0%}" if recall and chance and not arm.aside else "",
            ),
        ]
        table.rows.append(Row(name=arm.label, cells=cells))
    return table


def _by_layer(run: Upcycled) -> Facts | None:
    """Every layer in figures, at the last look."""
    held = {name: dict(run.by_layer(-1, name)) for name, _, _ in LAYER_COLUMNS}
    held["keep"] = {n: value for n, value in enumerate(run.keep, start=1)}
    held["recall first"] = dict(run.by_layer(0, "recall")) if len(run.looks) > 1 else {}
    shown = [column for column in LAYER_COLUMNS if held[column[0]]]
    layers = sorted({n for values in held.values() for n in values})
    if not run.looks or not layers:
        return None
    table = Facts(title="Every layer in figures", columns=[heading for _, heading, _ in shown])
    for n in layers:
        values = [(held[name].get(n), form) for name, _, form in shown]
        cells = [Cell(value=NONE if value is None else format(value, form)) for value, form in values]
        table.rows.append(Row(name=f"layer {n}", cells=cells))
    return table
