"""Intervals: they cover what they should, pairs narrow them, and the same figures give the same interval."""

from __future__ import annotations

import numpy as np
import pytest

from fallow.errors import DataError
from fallow.evaluation import bootstrap, ruler


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = sum(bootstrap.mean(rng.exponential(2.0, 60), draws=500).holds(2.0) for _ in range(200))
    assert 175 <= covered <= 199  # 95 % of 200 is 190; a bootstrap of 60 skewed samples falls a little short


def test_pairs_are_narrower_than_either_alone() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(3.0, 1.0, 50)
    a, b = hard + rng.normal(0.1, 0.02, 50), hard
    found, alone = bootstrap.difference(a, b), bootstrap.mean(b)
    assert found.mean == pytest.approx(float(np.mean(a - b))) and found.above_zero
    assert found.high - found.low < 0.05 * (alone.high - alone.low)
    assert bootstrap.difference(a, b) == found


def test_a_ratio_weighs_samples_by_their_denominator() -> None:
    found = bootstrap.ratio([10.0, 1.0], [5.0, 5.0])
    assert found.mean == pytest.approx(1.1) and found.low == pytest.approx(0.2) and found.high == pytest.approx(2.0)


def test_tasks_weigh_alike_whatever_their_number_of_documents() -> None:
    found = ruler.stratified([[1.0] * 90, [0.0] * 10])
    assert found.mean == 0.5 and found.low == found.high == 0.5


def test_no_sample_is_refused() -> None:
    with pytest.raises(DataError, match="no sample"):
        bootstrap.mean([])
