"""Figures and findings in words: units a reader knows, and a headline that says plainly when sparsity lost.

The headline is computed, never chosen by hand: it reports the sparse arm that did best at equal seconds, or at equal
tokens where seconds do not overlap. The verdict falls on the loss at equal seconds: time is what the reader pays. A
model made to be served sparse is told by its bytes and its loss at equal tokens, and the verdict stays open: its gain
is in serving, which training does not measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fallow.report.analysis import SAME_LOSS, Arm, Comparison, Spread, seconds_to_loss
from fallow.report.doubts import BUSY, drift
from fallow.report.upcycle_data import read as upcycled

SERVED = (
    "In training upcycling saves nothing: its gain is speed when the model is served, which “fallow bench upcycle” "
    "measures and “fallow generate” shows."
)


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What one arm bought or cost."""

    arm: str
    outcome: str
    """`won`, `lost`, `draw` or `open`: its loss against dense's at equal seconds; `control` for a dense arm, and for
    one that chooses channels as no model could be served."""
    title: str
    sentence: str


def tokens(value: float) -> str:
    return _scaled(value, [(1e9, " B"), (1e6, " M"), (1e3, " k")])


def _scaled(value: float, units: list[tuple[float, str]]) -> str:
    for size, unit in units:
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def rate(value: float) -> str:
    """Tokens per second."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.1f} min"
    return f"{int(minutes // 60)} h {int(minutes % 60):02d} min"


def memory(mb: float) -> str:
    return f"{mb / 1024:.2f} GB" if mb >= 1024 else f"{mb:.0f} MB"


def size(value: float) -> str:
    """Bytes; units are powers of 1024, as in `memory`."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GB" if value < 1000 else f"{value:,.0f} GB"


def loss(value: float) -> str:
    return f"{value:.3f}"


def signed(value: float) -> str:
    """A gap in nats with a true minus sign."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def times(value: float) -> str:
    return f"{value:.2f}×"


def experts(held: Mapping[str, Any]) -> str:
    """How many of its experts a token computes: `4 of 16 experts`, or the range over layers."""
    active, every = held.get("active"), held.get("experts")
    counts = sorted({k for k in (active if isinstance(active, list) else [active]) if isinstance(k, int)})
    if not counts or not isinstance(every, int):
        return "some experts"
    return f"{counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} of {every} experts"


def outcome(gap: Spread | None) -> str:
    """`won`, `lost`, or `draw` when the gap is within the noise floor or its repeats disagree about the sign."""
    if gap is None:
        return "open"
    if abs(gap.mean) < SAME_LOSS or gap.low < 0 < gap.high:
        return "draw"
    return "won" if gap.mean < 0 else "lost"


def _than(gap: Spread) -> str:
    if outcome(gap) != "draw":
        word = "higher" if gap.mean > 0 else "lower"
        return f"{abs(gap.mean):.3f} nats {word}"
    if len(gap.values) > 1 and gap.low < 0 < gap.high:
        return f"the same within its seeds ({signed(gap.low)} to {signed(gap.high)} nats)"
    return f"the same (within {SAME_LOSS} nats)"


def sentence(arm: Arm, baseline: Arm) -> str:
    """Speed and both gaps of one arm, and how long it took to its baseline's final loss."""
    parts = []
    if arm.ratio:
        parts.append(f"{arm.label} trained {times(arm.ratio.mean)} as many tokens per second as {baseline.label}")
    gaps = []
    if arm.gap_tokens:
        gaps.append(f"at equal tokens its loss is {_than(arm.gap_tokens)}")
    if arm.gap_seconds:
        against = f", against {arm.control} that was planned for that time" if arm.control else ""
        gaps.append(f"at equal seconds {'' if gaps else 'its loss is '}{_than(arm.gap_seconds)}{against}")
    if not gaps:
        gaps.append("no evaluation of both overlaps, so what that cost in quality is not known")
    text = "; ".join([*parts, ", ".join(gaps)])
    text = text if parts else text[0].upper() + text[1:]
    return f"{text}.{_time_to_match(arm, baseline)}{_state(arm, baseline)}"


def _state(arm: Arm, baseline: Arm) -> str:
    """What the model's state weighs beside the baseline's; empty where it weighs the same."""
    ours, theirs = arm.state_bytes, baseline.state_bytes
    if ours is None or theirs is None or abs(ours.mean / theirs.mean - 1) < 0.005:
        return ""
    return f" Its model state takes {size(ours.mean)}, {ours.mean / theirs.mean:.0%} of {baseline.label}’s."


def _time_to_match(arm: Arm, baseline: Arm) -> str:
    """How long the first repeat took to the loss its baseline ended at; empty where that says nothing new."""
    if not baseline.loss or len(arm.runs) > 1 or {arm.status, baseline.status} != {"finished"} or arm.method is None:
        return ""
    target = baseline.runs[0].evals[-1]["loss"] if baseline.runs[0].evals else None
    theirs = baseline.train_seconds
    if target is None or theirs is None or len(arm.runs[0].evals) < 2:
        return ""
    ours = seconds_to_loss(arm.runs[0], target)
    if ours is None:
        return f" It never reached {baseline.label}’s final loss of {loss(target)}."
    return (
        f" It reached {baseline.label}’s final loss of {loss(target)} after {duration(ours)}; "
        f"{baseline.label} took {duration(theirs.mean)}."
    )


def verdict(arm: Arm, baseline: Arm) -> Verdict:
    """The finding on one arm."""
    if arm.for_serving:
        return _served(arm, baseline)
    result = outcome(arm.gap_seconds)
    speed = times(arm.ratio.mean) if arm.ratio else None
    faster = arm.ratio is not None and arm.ratio.mean >= 1.005
    if arm.method is None:
        title = f"{arm.label} is a dense control."
    elif result == "won":
        title = f"In the same time, {arm.label} reached a lower loss than {baseline.label}."
    elif result == "lost" and faster:
        title = f"Sparsity lost: {arm.label} ran {speed} as fast, yet {baseline.label} learned more in the same time."
    elif result == "lost":
        title = f"Sparsity lost: {arm.label} was no faster than {baseline.label} and learned less in the same time."
    elif result == "draw":
        title = f"A draw: in the same time, {arm.label} and {baseline.label} reached the same loss."
    elif arm.ratio and arm.gap_tokens:
        loss_word = f"at equal tokens its loss is {_than(arm.gap_tokens)}"
        title = f"{arm.label} ran {speed} as fast as {baseline.label}; {loss_word}."
    elif arm.ratio:
        word = f"{speed} as fast as {baseline.label}"
        title = f"{arm.label} trained {word}; what that did to its loss was not measured."
    else:
        title = f"{arm.label} cannot be compared with {baseline.label} yet."
    if arm.method is None:
        result = "control"
    return Verdict(arm=arm.name, outcome=result, title=title, sentence=sentence(arm, baseline))


def _served(arm: Arm, baseline: Arm) -> Verdict:
    """Of a model made to be served sparse: what it reads less, and what that costs at equal tokens."""
    run = upcycled(arm.runs[0])
    reads, kept = (run.reads, run.kept) if run is not None else (None, "some")
    title = f"{arm.label} computes {kept} channels per token"
    if reads is not None:
        title = f"{arm.label} reads {reads:.0%} of its feed-forward bytes per token"
    if arm.aside and run is not None:
        title = f"{arm.label} is a control: {kept} channels, chosen {run.chooser}"
    cost = "what that costs in loss was not measured yet"
    if arm.gap_tokens and arm.dense_loss:
        cost = f"at equal tokens its loss is {_than(arm.gap_tokens)}"
        cost += "" if outcome(arm.gap_tokens) == "draw" else f" than {baseline.label}’s"
    text = []
    if arm.loss and arm.dense_loss:
        both = f"Computed sparse, as it is served, its held-out loss is {loss(arm.loss.mean)}"
        both += f", with all channels {loss(arm.dense_loss.mean)}"
        text.append(both + (f"; {baseline.label} ended at {loss(baseline.loss.mean)}." if baseline.loss else "."))
    if arm.ratio:
        text.append(f"It trained {times(arm.ratio.mean)} as many tokens per second as {baseline.label}.")
    return Verdict(
        arm=arm.name,
        outcome="control" if arm.aside else "open",
        title=f"{title}; {cost}.",
        sentence=" ".join(text) + _state(arm, baseline),
    )


def verdicts(comparison: Comparison) -> list[Verdict]:
    """One per arm that is measured against a baseline, best at equal seconds first, dense controls last."""
    baseline = comparison.baseline
    if baseline is None:
        return []
    others = [arm for arm in comparison.arms if arm is not baseline]
    moved = drift(comparison)
    found = [verdict(arm, baseline) for arm in sorted(others, key=_merit)]
    return [_undecided(v, moved) if moved > BUSY and v.outcome in ("won", "lost", "draw") else v for v in found]


def _undecided(found: Verdict, moved: float) -> Verdict:
    """The machine was too unsteady for what a time decides."""
    title = f"No verdict: the machine’s pace moved by {moved:.0%} between arms. Run it again on a quiet one."
    return Verdict(arm=found.arm, outcome="open", title=title, sentence=found.sentence)


def _merit(arm: Arm) -> tuple[bool, bool, bool, float]:
    found = arm.gap_tokens if arm.for_serving else arm.gap_seconds or arm.gap_tokens
    unread = arm.gap_seconds is None and not arm.for_serving
    return arm.method is None, arm.aside, unread, found.mean if found else float("inf")


def headline(comparison: Comparison) -> Verdict:
    """What the page says first."""
    found = verdicts(comparison)
    sparse = [v for v in found if any(arm.name == v.arm for arm in comparison.sparse)]
    if sparse:
        best = sparse[0]
        if all(arm.for_serving for arm in comparison.sparse):
            served = sum(not arm.aside for arm in comparison.sparse)
            others = f" Of {served} upcycled arms it lost least at equal tokens." if served > 1 else ""
            text = f"{best.sentence} {SERVED}{others}".strip()
            return Verdict(arm=best.arm, outcome=best.outcome, title=best.title, sentence=text)
        if len(sparse) > 1 and drift(comparison) <= BUSY:
            lost = sum(v.outcome == "lost" for v in sparse)
            won = sum(v.outcome == "won" for v in sparse)
            others = (
                f" Of {len(sparse)} sparse arms {won} won and {lost} lost at equal seconds; this is the best of them."
            )
            return Verdict(arm=best.arm, outcome=best.outcome, title=best.title, sentence=best.sentence + others)
        return best
    return _alone(comparison)


def _alone(comparison: Comparison) -> Verdict:
    """The headline where there is nothing to compare."""
    arm = comparison.sparse[0] if comparison.sparse else comparison.arms[0]
    first, last = (arm.runs[0].evals[0]["loss"], arm.runs[0].evals[-1]["loss"]) if arm.runs[0].evals else (None, None)
    if first is None or last is None or len(arm.runs[0].evals) < 2:
        title = f"{arm.label} has no evaluation to show yet."
    else:
        served = ", computed sparse," if arm.dense_loss else ""
        title = f"{arm.label} brought the evaluation loss{served} from {loss(first)} to {loss(last)} nats."
    text = ""
    if arm.tokens and arm.train_seconds and arm.tokens_per_second:
        read = f"{tokens(arm.tokens.mean)} tokens in {duration(arm.train_seconds.mean)}"
        text = f"It trained on {read}, {rate(arm.tokens_per_second.mean)} tokens per second. "
    if comparison.sparse:
        text += "No dense run stands beside it, so nothing here says what sparsity bought: “fallow compare” runs both."
    else:
        text += "No sparse run stands beside it, so there is nothing to compare."
    return Verdict(arm=arm.name, outcome="open", title=title, sentence=text)
