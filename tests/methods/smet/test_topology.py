"""SMET's topology: how many, which first, which next; and the clocks that count from a weight's birth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import ConfigError
from fallow.methods.smet import clock as clocks
from fallow.methods.smet import moving, topology
from fallow.ops import packed

SHAPES = [(64, 64), (64, 256), (256, 64), (16, 16)]


def test_erk_keeps_the_budget_and_favours_small_layers():
    for density in (0.05, 0.25, 0.5, 0.9):
        found = topology.densities(SHAPES, density, "erk")
        weights = [o * i for o, i in SHAPES]
        assert sum(d * w for d, w in zip(found, weights, strict=True)) == pytest.approx(density * sum(weights))
        assert all(0 < d <= 1 for d in found)
        assert found[3] >= found[0] >= found[1] == found[2]
    assert topology.densities(SHAPES, 0.3, "uniform") == [0.3] * 4


@pytest.mark.parametrize("per_row", [True, False])
def test_a_move_keeps_the_count_and_never_regrows_the_dead(per_row):
    g = topology.generator(3, 0, 0)
    alive = topology.first_mask(None, (12, 40), 10 if per_row else 120, per_row=per_row, g=g)
    magnitude = torch.rand(12, 40, generator=g)
    new = topology.move(alive, magnitude, 0.2, per_row=per_row, g=topology.generator(3, 1, 0))
    born, dead = new & ~alive, alive & ~new
    assert new.sum() == alive.sum() and born.sum() == dead.sum() == 24
    if per_row:
        assert (new.sum(1) == 10).all() and (born.sum(1) == 2).all()
        for row in range(12):
            assert magnitude[row][dead[row]].max() < magnitude[row][alive[row] & new[row]].min()
    else:
        assert magnitude[dead].max() < magnitude[alive & new].min()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 17), st.floats(0.01, 1), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_moves_of_any_size_are_sound(rows, cols, density, fraction, per_row, seed):
    g = topology.generator(seed, 0, 0)
    count = topology.active_count((rows, cols), density, per_row=per_row)
    alive = topology.first_mask(None, (rows, cols), count, per_row=per_row, g=g)
    assert int(alive.sum()) == count * (rows if per_row else 1)
    new = topology.move(alive, torch.rand(rows, cols, generator=g), fraction, per_row=per_row, g=g)
    assert int(new.sum()) == int(alive.sum())
    assert (new & alive).any(), "something survives"
    if per_row:
        assert (new.sum(1) == count).all()


def test_growth_follows_scores_and_draws_are_repeatable():
    g = topology.generator(0, 0, 0)
    alive = topology.first_mask(torch.arange(40.0).view(4, 10), (4, 10), 3, per_row=True, g=g)
    assert alive[:, 7:].all() and not alive[:, :7].any(), "the largest scores"
    scores = torch.zeros(4, 10)
    scores[:, 2] = 5
    new = topology.move(alive, torch.arange(40.0).view(4, 10), 0.34, per_row=True, g=g, growth_RC=scores)
    assert new[:, 2].all() and not new[:, 7].any()
    draws = [torch.rand(4, generator=topology.generator(*k)) for k in ((1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 3, 3))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


def test_fractions_and_grids():
    cosine = {"start": 0.2, "end": 0.005, "schedule": "cosine", "stop_at": 0.75}
    at = [topology.fraction_at(s, 400, **cosine) for s in (0, 149, 299, 399)]
    assert at[0] == pytest.approx(0.2, rel=1e-3) and at[1] == pytest.approx(0.1025, rel=1e-3)
    assert at[2] == at[3] == pytest.approx(0.005)
    assert topology.fraction_at(7, 400, **(cosine | {"schedule": "constant"})) == 0.2
    assert topology.grid_of("x", (64, 96), 32) == (2, 3)
    with pytest.raises(ConfigError, match="block=64 does not divide the 96 inputs of up; use block=32"):
        topology.grid_of("up", (64, 96), 64)
    with pytest.raises(ConfigError, match="no multiple of 16"):
        topology.grid_of("up", (43, 96), 16)


def test_age_bytes_tell_every_steps_count():
    """Replays 700 updates entry by entry with real counters."""
    clock, g = clocks.Clock(), torch.Generator().manual_seed(0)
    age = torch.full((64,), clocks.FIRST, dtype=torch.uint8)
    born_at = torch.zeros(64, dtype=torch.int64)
    step = 0
    for update in range(300):
        step += int(torch.randint(1, 9, (1,), generator=g))
        newborn = torch.rand(64, generator=g) < 0.02
        age = torch.where(newborn, 0, clocks.older(age)).to(torch.uint8)
        clock.moved(step)
        born_at[newborn] = step
        now = step + 1
        table = clock.steps_of(now)
        young = age != clocks.FIRST
        assert torch.equal(table[age.long()][young], (now - born_at)[young].double()), update
        assert (table[clocks.FIRST] == now) and len(clock.updates) <= 255


def test_the_ramp_is_for_the_newborn_only():
    clock = clocks.Clock()
    clock.moved(100)
    sizes, roots = clocks.tables(clock, 101, lr=1.0, betas=(0.9, 0.999), local=True, warmup=10)
    assert float(sizes[0]) == pytest.approx(0.1 / (1 - 0.9), rel=1e-6)
    assert float(roots[0]) == pytest.approx(0.001**0.5, rel=1e-4)
    assert float(sizes[clocks.FIRST]) == pytest.approx(1 / (1 - 0.9**101))
    plain, _ = clocks.tables(clock, 101, lr=1.0, betas=(0.9, 0.999), local=False, warmup=0)
    assert float(plain[0]) == float(plain[clocks.FIRST])


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("grown", ["random", "candidates"])
def test_moving_by_groups_of_rows_is_the_same_update(per_row, grown, monkeypatch):
    monkeypatch.setattr(moving, "AT_ONCE", 100)  # three rows at a time
    g = topology.generator(1, 0, 0)
    alive = topology.first_mask(None, (16, 37), 9 if per_row else 144, per_row=per_row, g=g)
    layout = packed.layout_of(alive)
    weights = torch.randn(16, 37, generator=g)
    candidates = None
    n = 2 if per_row else 29
    if grown == "candidates":
        score = torch.rand(16, 37, generator=g).masked_fill(alive, -1)
        candidates = packed.naive.pack_bits(topology.largest(score, n, per_row=per_row))
    values = weights[alive]
    bitmap = moving.moved(layout, values, 0.2, per_row=per_row, g=topology.generator(1, 1, 0), candidates_OB=candidates)
    assert torch.equal(values, weights[alive]), "an update is decided by the weights and does not touch them"
    new = packed.naive.unpack_bits(bitmap, 37)
    growth = None if candidates is None else packed.naive.unpack_bits(candidates, 37).float()
    want = topology.move(alive, weights.abs(), 0.2, per_row=per_row, g=topology.generator(1, 1, 0), growth_RC=growth)
    assert int(new.sum()) == int(alive.sum())
    assert torch.equal(alive & ~new, alive & ~want), "the same die"
    born = new & ~alive
    if grown == "candidates":
        assert torch.equal(new, want)
    if per_row:
        assert (born.sum(1) == n).all()
    after = packed.layout_from_bitmap(bitmap, 37)
    recoded = moving.recode(weights[alive], layout, after)
    assert torch.equal(packed.expand(recoded, after), weights * (alive & new))


def test_distinct_draws_are_uniform():
    counts = torch.zeros(10)
    for seed in range(2000):
        drawn = moving.distinct(10, 4, topology.generator(seed, 0, 0))
        assert len(drawn.unique()) == 4
        counts[drawn] += 1
    assert (counts / 2000 - 0.4).abs().max() < 0.05
    assert moving.distinct(5, 5, topology.generator(0, 0, 0)).tolist() == [0, 1, 2, 3, 4]
