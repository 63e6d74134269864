"""When SSD switches: a pure function of the config and of what was observed so far, so that a log can be replayed.

An observation is made every `monitor_every` steps; phases change only there, and where the begin and the end of the
run say so. What was seen, what was decided and why stand in one log entry each (`Entry`), which is the state of this
machine: nothing else is remembered.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fallow.methods.ssd.config import SSD

Phase = Literal["dense", "sparse", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was observed on the fixed held-out batch, means over layers; None where it was not looked at."""

    similarity: float | None = None
    """Correlation of the activation patterns with those of the observation before."""
    zeros: float | None = None
    """Share of activations that are zero."""
    dense_loss: float | None = None
    """nats per token, every expert computed."""
    sparse_loss: float | None = None
    """The same with k experts; only after the first partition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the log."""

    step: int
    total: int
    before: Phase
    phase: Phase
    """From this step on."""
    repartition: bool
    """The neurons are sorted anew before this step."""
    reason: str
    seen: Seen

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(line: dict[str, Any]) -> Entry:
        return Entry(**{k: v for k, v in line.items() if k != "seen"}, seen=Seen(**line["seen"]))


def interval(config: SSD, total: int) -> int:
    """Steps between two observations."""
    every = config.monitor_every
    return max(1, round(every if every >= 1 else every * total))


def due(config: SSD, step: int, total: int) -> bool:
    """Whether something is observed or may change before `step`."""
    begin = round(config.dense_start * total) if config.schedule == "fixed" else 0
    return step % interval(config, total) == 0 or step in (begin, end_step(config, total))


def end_step(config: SSD, total: int) -> int:
    """First step of the end of the run; `total` where there is none."""
    if config.schedule in ("always_sparse", "always_dense"):
        return total
    return total - round(config.end_share * total)


def decide(config: SSD, log: list[Entry], step: int, total: int, seen: Seen) -> Entry:
    """The phase from `step` on.

    Args:
        log: all entries so far, oldest first.
        seen: what was observed just now.
    """
    before: Phase = log[-1].phase if log else "dense"
    parted = any(e.repartition for e in log)

    def entry(phase: Phase, reason: str, *, anew: bool = False) -> Entry:
        return Entry(step=step, total=total, before=before, phase=phase, repartition=anew, reason=reason, seen=seen)

    if config.schedule == "always_dense":
        return entry("dense", "always dense")
    if config.schedule == "always_sparse":
        return entry("sparse", "always sparse", anew=not parted)
    if step >= end_step(config, total):
        if config.end == "dense":
            return entry("dense", "the end of the run is dense")
        stale = before == "dense"  # made before this dense phase, or never
        return entry("mixed", "the end of the run alternates dense and sparse steps", anew=stale)
    if step < round(config.dense_start * total):
        return entry("dense", "the beginning of the run is dense")
    since = step - _began(log, before)
    if before == "sparse":
        return _from_sparse(config, entry, seen, since, total)
    if parted and since < round(config.dense_share * total):
        return entry("dense", "a dense phase has its least length")
    if config.schedule == "fixed":
        return entry("sparse", "fixed schedule", anew=True)
    return _from_dense(config, log, entry, seen)


def _began(log: list[Entry], phase: Phase) -> int:
    """Step at which the phase in force began."""
    began = 0
    for line in reversed(log):
        if line.phase != phase:
            break
        began = line.step
    return began


def _from_sparse(config: SSD, entry: Any, seen: Seen, since: int, total: int) -> Entry:
    if seen.sparse_loss is not None and seen.dense_loss is not None:
        gap = seen.sparse_loss - seen.dense_loss
        if config.schedule == "adaptive" and gap > config.max_gap:
            return entry("dense", f"computed sparse, the loss is {gap:.3f} nats higher, more than {config.max_gap:g}")
    if since >= round(config.sparse_share * total):
        return entry("dense", f"the partition is {since} steps old")
    return entry("sparse", "goes on")


def _from_dense(config: SSD, log: list[Entry], entry: Any, seen: Seen) -> Entry:
    """Similar enough and sparse enough, `patience` times in a row?"""
    if seen.similarity is None or seen.zeros is None:
        return entry("dense", "nothing to compare yet")
    recent = [seen]
    for line in reversed(log):
        if "sparse" in (line.before, line.phase) or len(recent) >= config.patience:
            break
        recent.append(line.seen)
    if seen.zeros < config.zeros:
        return entry("dense", f"{seen.zeros:.0%} zeros, fewer than {config.zeros:.0%}")
    if seen.similarity <= config.similarity:
        return entry("dense", f"similarity {seen.similarity:.3f} is not above {config.similarity:g}")
    agree = [(s.similarity or 0) > config.similarity and (s.zeros or 0) >= config.zeros for s in recent]
    if len(agree) < config.patience or not all(agree):
        return entry("dense", f"settled, but not yet {config.patience} times in a row")
    return entry("sparse", f"similarity {seen.similarity:.3f}, {seen.zeros:.0%} zeros", anew=True)


def replay(config: SSD, log: list[Entry]) -> list[Entry]:
    """The decisions anew from what the log says was seen; equal to `log` when it is sound."""
    again: list[Entry] = []
    for line in log:
        again.append(decide(config, again, line.step, line.total, line.seen))
    return again
