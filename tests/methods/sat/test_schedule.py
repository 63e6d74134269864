"""The ladder, and the rounding of rates to whole tiles and heads."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.methods.sat.schedule import kept_channels, kept_units, ladder_factor, spread


def test_ladder_is_constant_then_falls_in_equal_rungs_to_dense():
    factors = [ladder_factor(s, 100, rungs=4, rung_share=0.05) for s in range(100)]
    assert factors[:80] == [1.0] * 80
    assert factors[80:] == [0.75] * 5 + [0.5] * 5 + [0.25] * 5 + [0.0] * 5


@given(total=st.integers(1, 500), rungs=st.integers(1, 8), share=st.floats(0.01, 0.12))
def test_ladder_never_rises_and_ends_dense(total, rungs, share):
    factors = [ladder_factor(s, total, rungs=rungs, rung_share=share) for s in range(total)]
    assert all(a >= b for a, b in itertools.pairwise(factors))
    assert 0 <= factors[-1] <= 1
    if share * total >= 1:
        assert factors[-1] == 0


def test_no_ladder_is_constant():
    assert ladder_factor(999, 1000, rungs=0, rung_share=0.05) == 1.0


@pytest.mark.parametrize(
    ("n", "rate", "want"),
    [
        (1536, 0.5, 768),
        (1536, 0.3, 1088),
        (5632, 0.5, 2816),
        (11008, 0.5, 5504),
        (1536, 0.0, 1536),
        (64, 0.5, 32),
        (1536, 0.99, 64),
    ],
)
def test_kept_channels_are_tiles(n, rate, want):
    assert kept_channels(n, rate) == want


def test_heads_meet_the_rate_on_average():
    kept = kept_units(3, [0.5] * 30)
    assert set(kept) == {1, 2}
    assert sum(kept) == 45


@given(st.lists(st.floats(0, 0.95), min_size=1, max_size=40), st.integers(2, 32))
def test_at_least_one_head_stays(rates, n):
    assert all(1 <= k <= n for k in kept_units(n, rates))


@given(st.floats(0, 0.9), st.lists(st.floats(0.01, 5), min_size=2, max_size=40))
def test_spread_keeps_the_mean(rate, weights):
    rates = spread(rate, weights)
    assert sum(rates) / len(rates) == pytest.approx(rate, abs=1e-9)
    assert max(rates) <= 0.95 + 1e-12
