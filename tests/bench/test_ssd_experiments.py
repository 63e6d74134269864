"""SSD's experiments: every arm has prices to be had, and "seconds to dense's loss" is not won by leaving seeds out."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ssd_pace as pace  # noqa: E402
from ssd_arms import ARMS, SETS  # noqa: E402
from ssd_collate import Summary, best_dense, form_of, seconds_to_dense, summarise  # noqa: E402


def test_sets_name_the_arms_and_every_arm_is_timed():
    assert {arm.name for arms in SETS.values() for arm in arms} == set(ARMS)
    assert {form for name in ARMS for form in form_of(name)} <= set(pace.FORMS)
    assert set(pace.FORMS.values()) <= set(ARMS)


def summary(losses: dict[int, float], seconds: float) -> Summary:
    return Summary(dense=losses, seconds=dict.fromkeys(losses, seconds))


def test_seconds_to_dense_lie_on_the_line_between_two_runs():
    of = {"large-dense": summary({0: 4.0}, 100), "large-fixed-115": summary({0: 4.1}, 70)}
    of["large-fixed-120"] = summary({0: 3.9}, 90)
    assert seconds_to_dense(of, ["large-fixed-115", "large-fixed-120"]) == [pytest.approx(0.8)]


def test_dense_has_its_best_rate_and_a_run_that_falls_short_counts():
    of = {"large-dense": summary({0: 5.0, 1: 5.0}, 100), "large-dense-lr50": summary({0: 4.5}, 100)}
    of["large-fixed-120"] = summary({0: 4.8, 1: 4.8}, 80)
    assert best_dense(of, "large") == {0: 4.5, 1: 5.0}
    assert seconds_to_dense(of, ["large-fixed-120"]) == [math.inf, pytest.approx(0.8)]
    assert best_dense(of | {"dense-080": summary({0: 1.0}, 80)}, "wide") == {}, "of full length"


def test_a_run_costs_its_steps_looks_and_partitions():
    insight = {"observations": [0, 1], "partitions": [0]}
    run = {"arm": "large-fixed-120", "seed": 0, "steps": 12, "sparse_steps": 10, "heldout": 4.0, "insight": insight}
    run |= {"heldout_sparse": None, "parameters": 1}
    prices = {"large-dense": 1000.0, "large-sparse": 500.0, "large-observation": 100.0, "large-partition": 3000.0}
    found = summarise({"runs": [run]}, {"prices_ms": prices})
    assert found["large-fixed-120"].seconds[0] == pytest.approx(2 + 5 + 0.2 + 3)
    assert summarise({"runs": [run]}, {"prices_ms": {"large-dense": 1.0}}) == {}, "no price, no row"


def test_forms_that_are_not_timed_keep_their_prices(tmp_path):
    file = tmp_path / "pace.json"
    file.write_text(json.dumps({"prices_ms": {"a": 1, "b": 2}, "rows": [{"form": "a"}, {"form": "b"}]}))
    result = {"prices_ms": {"b": 3}, "rows": [{"form": "b", "new": True}]}
    pace.keep_others(result, file)
    assert result == {"prices_ms": {"a": 1, "b": 3}, "rows": [{"form": "a"}, {"form": "b", "new": True}]}
