"""Experts of equal size: the greedy assignment against brute force, k-means against chance and the optimum."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import ConfigError
from fallow.methods.ssd import clustering
from fallow.methods.ssd.partitioning import generator


def unit(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator(seed, 0, 0)), dim=1)


def greedy(score: torch.Tensor) -> torch.Tensor:
    """All pairs in descending order of score; ties to the lower row, then column."""
    F, E = score.shape
    found, room = [-1] * F, [F // E] * E
    for f, e in sorted(itertools.product(range(F), range(E)), key=lambda p: (-float(score[p]), p)):
        if found[f] < 0 and room[e]:
            found[f] = e
            room[e] -= 1
    return torch.tensor(found)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))


@settings(max_examples=60, deadline=None)
@given(shapes, st.booleans())
def test_assignment_is_the_greedy_one(shape, coarse):
    size, E, _d, seed = shape
    score = torch.randn(size * E, E, generator=generator(seed, 1, 0))
    if coarse:  # many ties
        score = score.round()
    assert torch.equal(clustering.balanced_assignment(score), greedy(score))


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(["balanced", "random"]), st.floats(0, 1))
def test_every_expert_has_as_many_neurons(shape, how, dead):
    """Also where some neurons never fired (a row of zeros), or all are alike."""
    size, E, d, seed = shape
    features = unit(size * E, d, seed)
    features[: int(dead * size * E)] = 0
    last = clustering.random_partition(size * E, E, generator(seed, 2, 0))
    for before in (None, last):
        found = clustering.partition_of(how, features, E, generator(seed, 3, 0), before)
        assert found.dtype == torch.int64
        assert torch.bincount(found, minlength=E).tolist() == [size] * E
        again = clustering.partition_of(how, features, E, generator(seed, 3, 0), before)
        assert torch.equal(found, again), "the seed decides"


def assignments(F: int, E: int):
    """Every partition of F rows into E numbered experts of equal size."""
    yield from set(itertools.permutations([e for e in range(E) for _ in range(F // E)]))


def test_balanced_beats_chance_and_is_near_the_optimum():
    """Against the best of all 1680 partitions of 9 into 3 x 3, of which 280 differ."""
    every = torch.tensor(sorted(assignments(9, 3)))
    ratios, chances = [], []
    for seed in range(8):
        features = unit(9, 4, seed)
        best = max(clustering.objective(features, a, 3) for a in every)
        found = max(
            clustering.objective(features, clustering.balanced_partition(features, 3, generator(seed, s, 0)), 3)
            for s in range(3)
        )
        chance = clustering.objective(features, clustering.random_partition(9, 3, generator(seed, 0, 0)), 3)
        assert chance <= found <= best + 1e-6
        ratios.append(found / best)
        chances.append(chance / best)
    assert sum(ratios) / 8 > 0.98 and min(ratios) > 0.93
    assert sum(chances) / 8 < 0.9, "the problem is not trivial"


def exact(score: torch.Tensor) -> float:
    """The largest total score of an assignment with equal sizes, by dynamic programming over the room left."""
    F, E = score.shape
    best = {(F // E,) * E: 0.0}
    for row in score.tolist():
        after: dict[tuple[int, ...], float] = {}
        for room, total in best.items():
            for e in range(E):
                if room[e]:
                    left = (*room[:e], room[e] - 1, *room[e + 1 :])
                    after[left] = max(after.get(left, -1e9), total + row[e])
        best = after
    return next(iter(best.values()))


def test_one_greedy_assignment_is_near_the_exact_one():
    """24 neurons to the directions of 4 experts that k-means found."""
    ratios = []
    for seed in range(10):
        features = unit(24, 8, seed)
        partition = clustering.balanced_partition(features, 4, generator(seed, 0, 0))
        score = features @ torch.nn.functional.normalize(clustering.sums(features, partition, 4), dim=1).t()
        ratios.append(float(score.gather(1, clustering.balanced_assignment(score)[:, None]).sum()) / exact(score))
    assert max(ratios) <= 1 + 1e-6 and sum(ratios) / len(ratios) > 0.99 and min(ratios) > 0.97


@pytest.mark.parametrize(("E", "size", "d"), [(4, 16, 32), (8, 8, 16), (2, 3, 8)])
def test_planted_clusters_are_found(E, size, d):
    centers = torch.linalg.qr(torch.randn(d, E, generator=generator(0, 0, 0))).Q.t()
    planted = torch.arange(E).repeat(size)
    noise = 0.1 * torch.randn(E * size, d, generator=generator(1, 0, 0))
    features = torch.nn.functional.normalize(centers[planted] + noise, dim=1)
    found = clustering.balanced_partition(features, E, generator(0, 0, 1))
    assert clustering.overlap(found, planted, E) == 1.0
    by_chance = clustering.random_partition(E * size, E, generator(0, 0, 1))
    assert clustering.overlap(by_chance, planted, E) < 0.9


def test_the_last_partition_is_kept_when_it_is_better(monkeypatch):
    features = unit(32, 6, 0)
    good = max(
        (clustering.balanced_partition(features, 4, generator(s, 0, 0)) for s in range(20)),
        key=lambda a: clustering.objective(features, a, 4),
    )
    for seed in range(20, 30):
        found = clustering.balanced_partition(features, 4, generator(seed, 0, 0), good)
        assert clustering.objective(features, found, 4) >= clustering.objective(features, good, 4)
    bad = clustering.random_partition(32, 4, generator(0, 0, 0))
    monkeypatch.setattr(clustering, "fresh_start", lambda f, e, g: good)
    found = clustering.balanced_partition(features, 4, generator(0, 0, 0), bad)
    assert clustering.objective(features, found, 4) >= clustering.objective(features, good, 4), "a fresh start is tried"


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_rounds_never_end_below_their_start(shape):
    size, E, d, seed = shape
    features = unit(size * E, d, seed)
    start = clustering.random_partition(size * E, E, generator(seed, 0, 0))
    found = clustering.balanced_partition(features, E, generator(seed, 1, 0), start)
    assert clustering.objective(features, found, E) >= clustering.objective(features, start, E) - 1e-6


def test_a_round_that_is_a_step_back_is_not_kept():
    """Of 12 neurons from this start, round by round, the last partition is worse than one before it."""
    features, partition = unit(12, 3, 1), clustering.random_partition(12, 4, generator(1, 1, 0))
    rounds, after = [], partition
    for _ in range(clustering.ROUNDS):
        rounds.append(clustering.objective(features, after, 4))
        after = clustering.balanced_assignment(
            features @ torch.nn.functional.normalize(clustering.sums(features, after, 4), dim=1).t()
        )
    assert rounds[-1] < max(rounds) - 0.01
    found = clustering.balanced_partition(features, 4, generator(1, 2, 0), partition)
    assert clustering.objective(features, found, 4) >= max(rounds) - 1e-6


def test_overlap_by_hand():
    a = torch.tensor([0, 0, 1, 1, 2, 2])
    assert clustering.overlap(a, torch.tensor([2, 2, 0, 0, 1, 1]), 3) == 1.0, "numbers of experts do not matter"
    assert clustering.overlap(a, torch.tensor([0, 1, 1, 2, 2, 0]), 3) == 0.5
    assert clustering.overlap(a, torch.tensor([0, 0, 1, 2, 1, 2]), 3) == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda f, e, g: torch.zeros(len(f), dtype=torch.int64),
        lambda f, e, g: torch.arange(len(f) - 1) % e,
        lambda f, e, g: (torch.arange(len(f)) % e).float(),
        lambda f, e, g: torch.arange(len(f)) % e + 1,
        lambda f, e, g: torch.arange(len(f)) % e - 1,
    ],
    ids=["one-sized", "short", "float", "too-large", "negative"],
)
def test_a_users_function_is_checked(wrong):
    features = unit(12, 3, 0)
    with pytest.raises(ConfigError, match="12 whole numbers from 0 to 3, each 3 times") as caught:
        clustering.partition_of(wrong, features, 4, generator(0, 0, 0), None)
    assert "\n" not in str(caught.value)
    right = clustering.partition_of(
        lambda f, e, g: [i % e for i in range(len(f))], features, 4, generator(0, 0, 0), None
    )
    assert right.tolist() == [0, 1, 2, 3] * 3
