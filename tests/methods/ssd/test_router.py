"""Routers: their recall on a planted problem, the numbers by hand, and that every call says the same."""

from __future__ import annotations

import pytest
import torch

from fallow.methods.ssd.router import centroid_router, fitted_router, mass, recall, route


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(T: int = 400, D: int = 16, E: int = 8, C: int = 12) -> tuple[torch.Tensor, ...]:
    """(x, gate rows, what each expert writes): experts are directions with noise, and half of them write ten times as
    much, which their input weights do not tell."""
    directions = torch.linalg.qr(torch.randn(D, E, generator=g(0))).Q.t()
    rows = directions.repeat_interleave(C, 0) + 0.15 * torch.randn(E * C, D, generator=g(1))
    x = torch.randn(T, D, generator=g(2))
    norms = torch.where(torch.arange(E) % 2 == 0, 10.0, 1.0).repeat_interleave(C)
    return x, rows, mass((x @ rows.t()).relu(), norms, E)


def test_fitted_beats_centroid_beats_chance():
    x, rows, mass_TE = planted()
    train, test = slice(0, 200), slice(200, 400)

    def found(router: torch.Tensor) -> float:
        return recall(route(x[test], router, 2)[0], mass_TE[test])[0]

    fitted = found(fitted_router(x[train], mass_TE[train]))
    centroid = found(centroid_router(rows, 8))
    chance = found(torch.randn(8, 16, generator=g(3)))
    oracle = recall(route(x[test], centroid_router(rows, 8), 2)[0], mass_TE[test])[1]
    assert chance + 0.1 < centroid < fitted - 0.1 < oracle
    assert fitted > 0.85 * oracle


def test_recall_by_hand():
    masses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 0.0, 0.0, 0.0]])
    assert recall(torch.tensor([[0, 3], [1, 2]]), masses) == (pytest.approx(5 / 14), pytest.approx(11 / 14))
    assert recall(torch.tensor([[0, 1, 2, 3]] * 2), masses) == (pytest.approx(1.0), pytest.approx(1.0))
    assert recall(torch.tensor([[0]]), torch.zeros(1, 4)) == (0.0, 0.0), "no neuron fires"


def test_mass_by_hand():
    hidden = torch.tensor([[1.0, -2.0, 0.0, 3.0]])
    assert mass(hidden, torch.tensor([1.0, 10.0, 5.0, 2.0]), 2).tolist() == [[21.0, 6.0]]


def test_centroids_by_hand():
    rows = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 3.0], [0.0, 4.0]])
    router = centroid_router(rows, 2)
    assert torch.allclose(router.norm(dim=1), torch.full((2,), (0.5**0.5 + 1) / 2)), "one norm: the mean of theirs"
    assert torch.allclose(router[0, 0], router[0, 1]) and torch.allclose(router[1, 0], torch.tensor(0.0))


def test_route_is_a_softmax_over_the_chosen_and_repeatable_with_ties():
    x, router = torch.randn(5, 6, generator=g(0)), torch.randn(4, 6, generator=g(1))
    router[2] = router[1]
    choice, share = route(x, router, 3)
    top = (x @ router.t()).gather(1, choice)
    assert torch.equal(top, top.sort(dim=1, descending=True).values)
    torch.testing.assert_close(share, top.softmax(1))
    assert all(len(set(row)) == 3 for row in choice.tolist())
    for equal in (router, torch.zeros(4, 6)):
        first = route(x, equal, 2)[0]
        assert all(torch.equal(first, route(x.clone(), equal.clone(), 2)[0]) for _ in range(5))


def test_logits_are_fp32_under_autocast_and_for_bf16_inputs():
    x, router = torch.randn(64, 32, generator=g(0)), torch.randn(8, 32, generator=g(1))
    want = route(x, router, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = route(x, router, 4)
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    assert route(x.bfloat16(), router, 4)[1].dtype == torch.float32
    rounded = route(x.bfloat16().float(), router, 4)
    assert torch.equal(route(x.bfloat16(), router, 4)[0], rounded[0])


def test_degenerate_batches_give_finite_routers():
    """One token, all inputs zero, no mass, one expert."""
    for x, masses in (
        (torch.randn(1, 4, generator=g(0)), torch.rand(1, 3, generator=g(1))),
        (torch.zeros(8, 4), torch.rand(8, 3, generator=g(1))),
        (torch.randn(8, 4, generator=g(0)), torch.zeros(8, 3)),
        (torch.randn(8, 4, generator=g(0)), torch.rand(8, 1, generator=g(1))),
    ):
        router = fitted_router(x, masses)
        assert router.shape == (masses.shape[1], 4) and router.isfinite().all()
