"""`bank_ffn` with a compensation: U (V x) + b is added, whichever kernel runs, and the same channels are chosen."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_bank_ffn import KINDS, LEVELS, TOLERANCE, make, native, run_cpu

from fallow.errors import ConfigError
from fallow.ops import bank_ffn as op
from fallow.ops.bank_ffn import dense, naive


def stand_in(
    width: int, rank: int, dtype: torch.dtype, seed: int = 9
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    v, u, b = (torch.randn(*shape, generator=g) for shape in ((rank, width), (width, rank), (width,)))
    dtype = torch.bfloat16 if dtype == torch.int8 else dtype
    return (v / width**0.5).to(dtype), (u / rank**0.5).to(dtype), b


def assert_adds(with_it, without, x, given, dtype) -> None:
    v, u, b = (t.double() for t in given)
    wanted = x.double() @ v.t() @ u.t() + b
    error = (with_it.double() - without.double() - wanted).norm() / (wanted.norm() + without.double().norm())
    assert torch.isfinite(with_it).all() and float(error) <= TOLERANCE[dtype], f"{float(error):.1e}"


@native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_add_it(kind, dtype, level):
    for T, D, R in ((1, 40, 64), (2, 33, 7), (3, 200, 16), (8, 7, 1), (11, 130, 70)):
        x, p, weights = make(T, D, 192, kind=kind, dtype=dtype, seed=T)
        given = stand_in(D, R, dtype)
        with_it = run_cpu(x, p._replace(compensation=given), weights, level=level)
        assert_adds(with_it, run_cpu(x, p, weights, level=level), x, given, dtype)


@native
def test_threads_do_not_change_a_bit():
    x, p, weights = make(2, 576, 1536, 64, kind="bilinear", dtype=torch.bfloat16)
    p = p._replace(compensation=stand_in(576, 64, torch.bfloat16))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run_cpu(x, p, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("module", [naive, dense], ids=lambda m: m.name)
def test_other_backends_add_it(module):
    if not module.available()[0]:
        pytest.skip(module.available()[1])
    x, p, weights = make(3, 48, 128, kind="linear", dtype=torch.float32)
    given = stand_in(48, 8, torch.float32)
    with torch.no_grad():
        found = [
            module.bank_ffn(x, q, *weights, act="silu", bank=32, keep=8) for q in (p, p._replace(compensation=given))
        ]
    assert_adds(found[1], found[0], x, given, torch.float32)


def test_it_survives_a_compiled_graph_and_counts_its_bytes():
    x, p, weights = make(1, 48, 128, kind="linear", dtype=torch.float32)
    given = stand_in(48, 8, torch.float32)
    more = p._replace(compensation=given)

    @torch.no_grad()
    def run(x):
        return op.bank_ffn(x, more, *weights, act="silu", bank=32, keep=8)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), run(x))
    read = [op.bytes_read(q, weights[1], bank=32, keep=8) for q in (p, more)]
    assert read[1] - read[0] == 4 * (2 * 48 * 8 + 48)


def test_it_has_no_gradients():
    x, p, weights = make(1, 48, 128, kind="linear", dtype=torch.float32)
    learning = tuple(t.requires_grad_() for t in stand_in(48, 8, torch.float32))
    with pytest.raises(ConfigError, match="no gradients"):
        op.bank_ffn(x, p._replace(compensation=learning), *weights, act="silu", bank=32, keep=8)


@pytest.mark.parametrize("shape", [((8, 47), (48, 8), (48,)), ((8, 48), (48, 7), (48,)), ((8, 48), (48, 8), (47,))])
def test_shapes_that_do_not_fit_are_named(shape):
    x, p, weights = make(1, 48, 128, kind="linear", dtype=torch.float32)
    bad = p._replace(compensation=tuple(torch.zeros(s) for s in shape))
    with pytest.raises(ConfigError, match="compensation of shapes"), torch.no_grad():
        op.bank_ffn(x, bad, *weights, act="silu", bank=32, keep=8)
