"""The section on runs that switch between dense and experts: what they saw of themselves, when and why they switched.

A final loss says that switching paid or not; it does not say why. So each such arm gets a block: a sentence, its main
figures, pictures (`insight_figures`) and the log of its decisions, of which the table shows those that changed
something. Of repeats that differ in their seed the first is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fallow.report import figures, wording
from fallow.report.analysis import Arm, Comparison
from fallow.report.figures import Figure
from fallow.report.insight_data import Insight, Line, Rows, mean, read
from fallow.report.insight_figures import Drawing
from fallow.report.loading import number
from fallow.report.view import NONE, Cell, Facts, Row

LONGEST = 300
"""Lines that a log has on the page; of a longer one every second, third, … and all that changed something."""
COLUMNS = ["Then", "Similarity", "Zeros", "Loss, dense", "Loss, sparse", "Why"]
MEASURES = {
    "overlap": "stayed with their group (overlap)",
    "noise_floor": "two tries agree on (noise floor)",
    "recall": "output kept by the router (recall)",
    "oracle": "by the best choice (oracle)",
    "random_recall": "random groups, by their router",
    "random_oracle": "random groups, by the best choice",
    "cohesion": "likeness within a group (cohesion)",
}
"""What was measured when neurons were sorted, and what the page calls it."""


@dataclass(kw_only=True, slots=True)
class Block:
    """One arm's."""

    arm: str
    label: str
    sentence: str
    cards: list[Cell]
    timeline: Figure | None
    charts: list[Figure]
    switches: Facts
    """The decisions that changed something, and the last one."""
    log: Facts
    sorted: Facts | None
    """What was measured each time neurons were sorted into experts."""
    phases: list[tuple[str, str]] = field(default_factory=list)
    """`(name, classes of the style sheet)` of the phases that occur."""

    @property
    def figures(self) -> list[Figure]:
        return [*([self.timeline] if self.timeline else []), *self.charts]


def blocks(comparison: Comparison) -> list[Block]:
    """One per arm with a run that wrote an insight; empty where none did."""
    palette = figures.colours(comparison)
    found = []
    for position, arm in enumerate(comparison.arms):
        held = [insight for run in arm.runs if (insight := read(run)) is not None]
        if held:
            found.append(_block(arm, held, key=f"insight{position}", colour=palette[arm.name]))
    return found


def _block(arm: Arm, held: list[Insight], *, key: str, colour: int) -> Block:
    insight = held[0]
    drawing = Drawing(insight, key=key, colour=colour)
    return Block(
        arm=arm.name,
        label=arm.label,
        sentence=" ".join([_sentence(arm, insight), *_repeats(held)]),
        cards=_cards(arm, insight),
        timeline=drawing.timeline(),
        charts=drawing.figures(),
        switches=_switches(insight),
        log=_log(insight),
        sorted=_sorted(insight),
        phases=list(dict.fromkeys((span.name, span.css) for span in drawing.spans)),
    )


# -- words ------------------------------------------------------------------------------------------------------------


def _sentence(arm: Arm, insight: Insight) -> str:
    phases, steps = insight.phases, insight.steps
    entered = [phase for phase in phases if phase.name == "sparse"]
    mixed = sum(phase.end - phase.start for phase in phases if phase.name == "mixed")
    which = wording.experts(insight.experts)
    if not entered and not mixed:
        last = insight.lines[-1].reason
        why = f"; its last look says why: {last}" if last else ""
        return f"{arm.label} stayed dense in all of its {steps:,} steps{why}."
    parts = []
    if entered:
        sparse = sum(phase.end - phase.start for phase in entered)
        stretches = f"in {len(entered)} stretches, the first from" if len(entered) > 1 else "from"
        parts.append(
            f"computed only experts in {sparse:,} of its {steps:,} steps, {stretches} step {entered[0].start:,}"
        )
    if mixed:
        parts.append(f"alternated in {mixed:,} {'more' if entered else f'of its {steps:,} steps'}")
    text = f"{arm.label} {', and '.join(parts)}."
    text += f" There each token computed {which} of every feed-forward layer."
    made = sum(line.anew for line in insight.lines)
    return text + (f" Neurons were sorted into experts {_times(made)}." if made else "")


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _repeats(held: list[Insight]) -> list[str]:
    if len(held) < 2:
        return []
    shares = [insight.sparse_share for insight in held]
    return [
        f"Drawn is the first of {len(held)} seeds; the others computed sparse in {_range(shares[1:])} of their steps."
    ]


def _range(shares: list[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def _cards(arm: Arm, insight: Insight) -> list[Cell]:
    found = [Cell(value=f"{insight.sparse_share:.0%}", note="of the training steps computed only experts")]
    share = insight.active_share
    if share is not None:
        which = wording.experts(insight.experts)
        found.append(Cell(value=f"{share:.0%}", note=f"of the feed-forward neurons in such a step: {which}"))
    dense, sparse = (number(arm.runs[0].info, "eval", "after", key) for key in ("loss", "sparse_loss"))
    where = "held-out text, at the end"
    if dense is None or sparse is None:
        both = [line.seen for line in insight.lines if line.gap is not None]
        dense, sparse = (both[-1]["dense_loss"], both[-1]["sparse_loss"]) if both else (None, None)
        where = "the watched batch, at the last look"
    if dense is not None and sparse is not None:
        losses = f"{wording.loss(sparse)} computed sparse, {wording.loss(dense)} dense"
        found.append(
            Cell(value=wording.signed(sparse - dense), note=f"nats of loss if served sparse: {losses} ({where})")
        )
    zeros = insight.observed("zeros")
    if zeros:
        found.append(Cell(value=f"{mean(zeros[-1][1]):.0%}", note="of activations were zero at the last look"))
    recall, oracle = insight.observed("recall"), insight.observed("oracle")
    if recall and oracle and mean(oracle[-1][1]) > 0:
        hit = mean(recall[-1][1]) / mean(oracle[-1][1])
        found.append(
            Cell(value=f"{hit:.0%}", note="of what the best choice of experts keeps, the router’s choice keeps")
        )
    return found


# -- tables -----------------------------------------------------------------------------------------------------------


def _switches(insight: Insight) -> Facts:
    last = insight.lines[-1]
    rows = [_row(line) for line in insight.lines if _changed(line) or line is last]
    return Facts(title="When and why it switched", columns=COLUMNS, rows=rows)


def _changed(line: Line) -> bool:
    return line.phase != line.before or line.anew


def _log(insight: Insight) -> Facts:
    lines = insight.lines
    stride = -(-len(lines) // LONGEST)
    kept = [line for n, line in enumerate(lines) if n % stride == 0 or _changed(line) or line is lines[-1]]
    title = f"Every decision ({len(lines):,})"
    if len(kept) < len(lines):
        title = f"{len(kept):,} of {len(lines):,} decisions; run.json has all of them"
    return Facts(title=title, columns=COLUMNS, rows=[_row(line) for line in kept])


def _row(line: Line) -> Row:
    seen = line.seen

    def cell(name: str, form: str) -> Cell:
        value = seen[name]
        return Cell(value=NONE if value is None else format(value, form))

    what = f"{line.before} → {line.phase}" if line.phase != line.before else f"stays {line.phase}"
    gap = line.gap
    sparse = cell("sparse_loss", ".3f")
    sparse.note = "" if gap is None else f"{wording.signed(gap)}"
    reason = Cell(value=line.reason or NONE, note="neurons sorted into experts" if line.anew else "", css="why")
    cells = [
        Cell(value=what, css="then"),
        cell("similarity", ".3f"),
        cell("zeros", ".1%"),
        cell("dense_loss", ".3f"),
        sparse,
        reason,
    ]
    return Row(name=f"{line.step:,}", cells=cells)


def _sorted(insight: Insight) -> Facts | None:
    """Means over layers, one column per step at which neurons were sorted."""
    held: dict[str, Rows] = {name: insight.parted(name) for name in MEASURES}
    steps = sorted({step for rows in held.values() for step, _ in rows})
    if not steps:
        return None
    steps = steps[:6] + steps[-6:] if len(steps) > 12 else steps
    table = Facts(title="Each time neurons were sorted, in figures", columns=[f"step {step:,}" for step in steps])
    for name, words in MEASURES.items():
        values = {step: mean(row) for step, row in held[name]}
        if values:
            form = ".3f" if name == "cohesion" else ".1%"
            cells = [Cell(value=format(values[step], form) if step in values else NONE) for step in steps]
            table.rows.append(Row(name=words, cells=cells))
    return table
