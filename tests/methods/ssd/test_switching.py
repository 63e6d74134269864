"""The switching rule, one rule at a time on observations made by hand; logs that replay; a log that was changed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fallow import SSD
from fallow.errors import ConfigError
from fallow.methods.ssd import switching
from fallow.methods.ssd.switching import Entry, Seen

TOTAL = 100
GOOD = Seen(similarity=0.95, zeros=0.9, dense_loss=3.0)


def config(**changes: Any) -> SSD:
    base: dict[str, Any] = {"monitor_every": 0.05, "dense_start": 0.1, "sparse_share": 0.3, "dense_share": 0.1}
    return SSD(**(base | changes))


def run(c: SSD, seen: Any, total: int = TOTAL) -> list[Entry]:
    """The log of a whole run; `seen` is an observation, or a function of (step, phase so far)."""
    log: list[Entry] = []
    for step in range(total):
        if switching.due(c, step, total):
            before = log[-1].phase if log else "dense"
            log.append(switching.decide(c, log, step, total, seen(step, before) if callable(seen) else seen))
    return log


def letters(log: list[Entry]) -> str:
    return "".join(e.phase[0] for e in log)


def test_a_whole_run_as_written_down():
    """0-10 dense by rule, then settled at once; 30 % sparse, 10 % dense, …; mixed from 90 %."""
    log = run(config(), GOOD)
    assert [e.step for e in log] == list(range(0, 100, 5))
    assert letters(log) == "dd" + "ssssss" + "dd" + "ssssss" + "dd" + "mm"
    assert [e.step for e in log if e.repartition] == [10, 50, 90], "and once more for the end, from a dense phase"
    assert {e.reason for e in log if e.step in (40, 80)} == {"the partition is 30 steps old"}
    assert log[-1].reason.startswith("the end of the run")


@pytest.mark.parametrize(("patience", "first"), [(1, 20), (2, 25), (3, 30)])
def test_patience(patience, first):
    """Good from step 20 on."""
    log = run(
        config(patience=patience), lambda step, _: GOOD if step >= 20 else replace(GOOD, similarity=0.5, zeros=0.9)
    )
    assert next(e.step for e in log if e.phase == "sparse") == first
    assert {e.reason for e in log if 20 <= e.step < first} <= {f"settled, but not yet {patience} times in a row"}


def test_patience_begins_anew_with_every_dense_phase():
    """Observations of a sparse phase do not count, nor does the one that ended it."""
    log = run(config(patience=3, dense_share=0.0), GOOD)
    assert letters(log) == "dd" + "ssssss" + "ddd" + "ssssss" + "d" + "mm"
    assert log[10].reason == "settled, but not yet 3 times in a row"


def test_patience_is_broken_by_one_observation():
    good = {20, 30, 35}
    log = run(config(), lambda step, _: GOOD if step in good else replace(GOOD, zeros=0.5))
    assert [e.step for e in log if e.repartition and e.phase == "sparse"] == [35]


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (replace(GOOD, zeros=0.799), "80% zeros, fewer than 80%"),
        (replace(GOOD, similarity=0.9), "similarity 0.900 is not above 0.9"),
        (replace(GOOD, similarity=None), "nothing to compare yet"),
        (replace(GOOD, zeros=None), "nothing to compare yet"),
    ],
)
def test_what_keeps_it_dense(seen, reason):
    log = run(config(end="dense"), seen)
    assert letters(log) == "d" * 20
    assert log[10].reason == reason


def test_thresholds_are_those_of_the_config():
    seen = replace(GOOD, similarity=0.4, zeros=0.6)
    assert "s" not in letters(run(config(similarity=0.3), seen))
    assert "s" not in letters(run(config(zeros=0.6), seen))
    assert "s" in letters(run(config(similarity=0.3, zeros=0.6), seen))


def test_a_gap_ends_a_sparse_phase():
    def seen(step: int, before: str) -> Seen:
        return replace(GOOD, sparse_loss=3.0 + (0.21 if step >= 20 else 0.19)) if before == "sparse" else GOOD

    log = run(config(), seen)
    assert letters(log)[:7] == "ddssdds", "10 % dense at least, then settled still"
    assert log[4].reason == "computed sparse, the loss is 0.210 nats higher, more than 0.2"
    assert letters(run(config(max_gap=0.22), seen)) == letters(run(config(), GOOD))
    fixed = run(config(schedule="fixed"), seen)
    assert letters(fixed) == letters(run(config(schedule="fixed"), GOOD)), "a fixed schedule looks at no loss"


def test_begin_and_lengths():
    assert letters(run(config(dense_start=0.5), GOOD))[:11] == "d" * 10 + "s"
    log = run(config(sparse_share=1.0), GOOD)
    assert letters(log) == "dd" + "s" * 16 + "mm"
    log = run(config(dense_share=0.25, sparse_share=0.1), GOOD)
    assert letters(log) == "dd" + "ss" + "ddddd" + "ss" + "ddddd" + "ss" + "mm"


def test_the_end():
    assert letters(run(config(end="dense"), GOOD))[-2:] == "dd"
    assert letters(run(config(end_share=0), GOOD))[-4:] == "ddss", "no end: it goes on switching"
    bad = run(config(), replace(GOOD, zeros=0.0))
    assert letters(bad) == "d" * 18 + "mm"
    assert [e.step for e in bad if e.repartition] == [90], "never sparse before: experts are made for the end"
    odd = run(config(end_share=0.13), GOOD)
    assert next(e.step for e in odd if e.phase == "mixed") == 87, "the end comes on its step, observed or not"


def test_controls():
    for schedule, want in (("always_dense", "d"), ("always_sparse", "s")):
        log = run(config(schedule=schedule), GOOD)
        assert letters(log) == want * 20
        assert [e.step for e in log if e.repartition] == ([0] if want == "s" else [])


def test_fixed_begins_on_its_step():
    log = run(config(schedule="fixed", monitor_every=0.07, dense_start=0.1), replace(GOOD, zeros=0.0, similarity=-1.0))
    assert next(e.step for e in log if e.phase == "sparse") == 10
    assert letters(log) == letters(run(config(schedule="fixed", monitor_every=0.07), Seen())), "looks at nothing"


def test_observations_come_as_often_as_said():
    assert switching.interval(SSD(monitor_every=0.02), 1000) == 20
    assert switching.interval(SSD(monitor_every=7), 1000) == 7
    assert switching.interval(SSD(monitor_every=1), 1000) == 1
    assert switching.interval(SSD(monitor_every=0.001), 100) == 1


def noisy(step: int, before: str) -> Seen:
    """Different numbers every time, some of them missing."""
    x = (step * 7919 % 101) / 101
    return Seen(
        similarity=None if step < 5 else 0.8 + x / 5,
        zeros=0.7 + x / 3,
        dense_loss=3 - x,
        sparse_loss=3 - x + x / 3 if before == "sparse" else None,
    )


@pytest.mark.parametrize("schedule", ["adaptive", "fixed", "always_sparse", "always_dense"])
def test_a_log_replays_also_through_json(schedule):
    c = config(schedule=schedule, monitor_every=3, patience=1, sparse_share=0.1)
    log = run(c, noisy)
    assert switching.replay(c, log) == log
    told = json.loads(json.dumps([e.as_dict() for e in log]))
    assert [Entry.of(line) for line in told] == log
    assert schedule != "adaptive" or sum(e.before != e.phase for e in log) > 4


def test_a_log_that_was_changed_does_not_replay():
    c = config(monitor_every=3, patience=1, sparse_share=0.1)
    log = run(c, noisy)
    n = next(i for i, e in enumerate(log) if e.phase == "sparse" and e.repartition)
    for changed in (
        replace(log[n], phase="dense", repartition=False),
        replace(log[n], seen=replace(log[n].seen, zeros=0.1)),
        replace(log[n], step=log[n].step + 1, reason="because"),
        replace(log[n], repartition=False),
    ):
        other = [*log[:n], changed, *log[n + 1 :]]
        assert switching.replay(c, other) != other
    assert switching.replay(replace(c, zeros=0.99), log) != log, "another config decides otherwise"


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("experts", 0, "positive whole number"),
        ("experts", True, "positive whole number"),
        ("active", 17, "between 1 and experts=16"),
        ("active", 0, "between 1 and experts=16"),
        ("active", (4, 17), "active=17 .*between 1 and experts=16"),
        ("schedule", "sometimes", "'adaptive', 'fixed', 'always_sparse', 'always_dense'"),
        ("end", "sparse", "'dense', 'mixed'"),
        ("partition", "kmeans", "'balanced', 'random' or a function"),
        ("router", "mlp", "'centroid', 'fitted'"),
        ("relu", "yes", "'require', 'swap', 'ignore'"),
        ("zeros", 1.2, "between 0 and 1"),
        ("dense_start", float("nan"), "between 0 and 1"),
        ("similarity", 1.5, "between -1 and 1"),
        ("monitor_every", 0, "above 0"),
        ("patience", 0, "at least 1"),
        ("max_gap", -0.1, "not negative"),
    ],
)
def test_bad_settings_name_the_mend(field, value, match):
    with pytest.raises(ConfigError, match=match) as caught:
        SSD(**{field: value})
    assert "\n" not in str(caught.value)


def test_a_list_from_yaml_is_a_tuple():
    assert SSD(active=[4, 8]).active == (4, 8)  # type: ignore[arg-type]
