"""`bank_ffn`: the compiled kernel equals the truth for every kind of predictor, weight and activation, on ragged
shapes, with every instruction set; what it keeps is exactly the mask; with all channels kept it is the dense FFN."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.ops import bank_ffn as op
from fallow.ops.activation import ACTIVATIONS, activation
from fallow.ops.bank_ffn import Predictor, cpu, naive

# relative Frobenius error against fp64 with the same channels alive: fp32 sums in another order; bf16 rounds y, and
# int8 weights take x in 16 bits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.int8: 5e-3}
LEVELS = (0, 1, 2, 3)
native = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
KINDS = ("linear", "bilinear", "quantized4", "quantized2", "scores")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory a kernel forgot to write is NaN, never a lucky zero."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[0]


def make(
    T=3, D=40, channels=192, R=12, *, kind="linear", dtype=torch.float32, factors=None, gate="one", tilt=True, seed=0
) -> tuple[torch.Tensor, Predictor, list[Any]]:
    """(x, predictor, weights): gate, up and down of `dtype`, int8 meaning `Int8Rows` and x in bf16."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    full = [draw(channels, D) for _ in range(3)]
    weights = [op.int8_rows(w) if dtype == torch.int8 else w.to(dtype) for w in full]
    x = (draw(T, D) * D**0.5).to(torch.bfloat16 if dtype == torch.int8 else dtype)
    tilt_F = torch.rand(channels, generator=g) + 0.5 if tilt else None
    if kind == "scores":
        p = Predictor("scores", (torch.randn(T, channels, generator=g),), tilt_F, gate)
    elif kind.startswith("quantized"):
        p = Predictor("quantized", op.pack_quantized(full[0], full[1], bits=int(kind[-1]), group=32), tilt_F)
    else:
        pairs = (draw(R, D), draw(channels, R), draw(R, D), draw(channels, R))
        p = Predictor(kind, pairs[:2] if kind == "linear" else pairs, tilt_F, gate)
        if factors == torch.int8:
            p = op.pack_factors(p)
        elif factors is not None:
            p = p._replace(tensors=tuple(t.to(factors) for t in p.tensors))
    return x, p, weights


def exact(x, scores_TF, mask_TF, weights, act, gate="one") -> torch.Tensor:
    """fp64 y of the channels in the mask."""
    gate_FD, up_FD, down_FD = (naive.dense(w, torch.float32).double() for w in weights)
    h_TF = activation(x.double() @ gate_FD.t(), act) * (x.double() @ up_FD.t()) * mask_TF
    return (h_TF * 2 * torch.sigmoid(scores_TF.double()) if gate == "smooth" else h_TF) @ down_FD


def usual(x, mask_F, weights) -> float:
    """The norm of y if no sum cancelled: of one or two living channels one may, whatever tolerance holds for others."""
    gate_F, up_F, down_F = (naive.dense(w, torch.float32).double()[mask_F].norm(dim=1) for w in weights)
    return float((x.double().norm() ** 2 / x.shape[0] * gate_F * up_F * down_F).norm())


def masks_that_rounding_allows(scores_F: torch.Tensor, bank: int, keep: int):
    """The naive mask of a token, and those with the last in and the first out of a bank exchanged where their scores
    are too close for fp32 sums in another order to tell."""
    mask_F = naive.bank_mask(scores_F[None], bank=bank, keep=keep)[0]
    yield mask_F
    if keep == bank:
        return
    order = scores_F.view(-1, bank).sort(dim=1, descending=True, stable=True)
    gap = order.values[:, keep - 1] - order.values[:, keep]
    close = (gap <= 1e-4 * scores_F.view(-1, bank).abs().amax(1)).nonzero().flatten().tolist()
    assert len(close) <= 4, "too many near ties to test anything"
    for some in product((False, True), repeat=len(close)):
        other_F = mask_F.clone()
        for b in (b for b, exchanged in zip(close, some, strict=True) if exchanged):
            last_in, first_out = order.indices[b, keep - 1 : keep + 1] + b * bank
            other_F[last_in], other_F[first_out] = False, True
        yield other_F


def chosen_among_zeros(scores_F: torch.Tensor, bank: int, keep: int) -> bool:
    """Whether ReLU left a bank fewer than `keep` channels above zero: which of the others live is then a matter of
    their index, and of which sides of zero rounding puts them on."""
    banked = scores_F.view(-1, bank)
    return keep < bank and bool((banked.topk(keep).values[:, -1].abs() <= 1e-5 * banked.abs().amax(1)).any())


def assert_right(y, x, p, weights, *, act, bank, keep, dtype) -> None:
    channels = op.tensor_of(weights[0]).shape[0]
    scores_TF = naive.scores(x.float(), p, act)[:, :channels]
    assert y.dtype == x.dtype and y.shape == x.shape
    assert torch.isfinite(y).all(), "entries that were never written"
    for t in range(x.shape[0]):
        if (
            act.startswith("relu")
            and p.kind in ("bilinear", "quantized")
            and chosen_among_zeros(scores_TF[t], bank, keep)
        ):
            continue
        errors = []
        for mask_F in masks_that_rounding_allows(scores_TF[t], bank, keep):
            want = exact(x[t], scores_TF[t], mask_F, weights, act, p.gate)
            size = float(want.norm()) + 0.2 * usual(x[t], mask_F, weights)
            errors.append(float((y[t].double() - want).norm()) / size)
            if errors[-1] <= TOLERANCE[dtype]:
                break
        assert min(errors) <= TOLERANCE[dtype], f"token {t}: relative error {min(errors):.1e}"


def run_cpu(x, p, weights, *, act="silu", bank=64, keep=16, level=-1) -> torch.Tensor:
    with torch.no_grad():
        return cpu.bank_ffn(x, p, *weights, act=act, bank=bank, keep=keep, level=level)


@native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_matches_naive(kind, dtype, level):
    for T in (1, 2, 3, 8):
        for bank, keep, channels, D in ((64, 16, 192, 40), (16, 3, 80, 33), (128, 128, 128, 96), (32, 1, 96, 7)):
            x, p, weights = make(T, D, channels, kind=kind, dtype=dtype, seed=T)
            y = run_cpu(x, p, weights, bank=bank, keep=keep, level=level)
            assert_right(y, x, p, weights, act="silu", bank=bank, keep=keep, dtype=dtype)


@native
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["bilinear", "quantized4", "scores"])
def test_every_activation(act, kind):
    for level in LEVELS:
        x, p, weights = make(2, 48, 128, kind=kind)
        y = run_cpu(x, p, weights, act=act, bank=32, keep=9, level=level)
        assert_right(y, x, p, weights, act=act, bank=32, keep=9, dtype=torch.float32)


@native
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", ["linear", "bilinear"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_factors_of_other_types_than_the_weights(kind, factors, dtype):
    for R in (8, 70):
        x, p, weights = make(2, 72, 192, R, kind=kind, dtype=dtype, factors=factors)
        y = run_cpu(x, p, weights)
        assert_right(y, x, p, weights, act="silu", bank=64, keep=16, dtype=dtype)


@native
@pytest.mark.parametrize("kind", ["linear", "scores"])
def test_smooth_gate(kind):
    for level in LEVELS:
        x, p, weights = make(3, kind=kind, gate="smooth")
        y = run_cpu(x, p, weights, keep=5, level=level)
        assert_right(y, x, p, weights, act="silu", bank=64, keep=5, dtype=torch.float32)
        plain = run_cpu(x, p._replace(gate="one"), weights, keep=5, level=level)
        assert not torch.allclose(y, plain, rtol=1e-2)


@native
@settings(max_examples=80, deadline=None)
@given(
    T=st.integers(1, 8),
    D=st.integers(4, 700),
    bank=st.sampled_from([1, 4, 16, 24, 32, 64, 100, 128]),
    banks=st.integers(1, 20),
    share=st.floats(0, 1),
    R=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    tilt=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    act=st.sampled_from(ACTIVATIONS),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 99),
)
def test_cpu_matches_naive_on_any_shape(T, D, bank, banks, share, R, kind, tilt, dtype, act, level, seed):
    keep = max(1, round(share * bank))
    x, p, weights = make(T, D, bank * min(banks, -(-600 // bank)), R, kind=kind, dtype=dtype, tilt=tilt, seed=seed)
    y = run_cpu(x, p, weights, act=act, bank=bank, keep=keep, level=level)
    assert_right(y, x, p, weights, act=act, bank=bank, keep=keep, dtype=dtype)


@native
@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_lower_index(kind):
    """Equal rows of the predictor are equal scores, to the last bit."""
    x, p, weights = make(2, 32, 128, kind=kind, tilt=False)
    tensors = [t.clone() for t in p.tensors]
    if kind == "scores":
        tensors[0][:] = 1.0
    elif kind.startswith("quantized"):
        for t in tensors:
            t.view(t.shape[0], t.shape[1], -1)[:] = t.view(t.shape[0], t.shape[1], -1)[:1, :1, :1]
    else:
        for t in tensors[1::2]:
            t[:] = t[:1].clone()
    p = p._replace(tensors=tuple(tensors))
    first = (torch.arange(128) % 32 < 5).expand(2, -1)
    for level in LEVELS:
        y = run_cpu(x, p, weights, bank=32, keep=5, level=level)
        want = exact(x, torch.zeros(2, 128), first, weights, "silu")
        assert (y.double() - want).norm() <= 1e-5 * want.norm(), level


@native
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_all_channels_kept_is_the_dense_ffn(dtype):
    x, p, weights = make(2, 50, 128, dtype=dtype)
    y = run_cpu(x, p, weights, keep=64)
    gate, up, down = (naive.dense(w, torch.float32) for w in weights)
    want = (F.silu(x.float() @ gate.t()) * (x.float() @ up.t())) @ down
    assert (y.float() - want).norm() <= TOLERANCE[dtype] * want.norm()


@native
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_only_living_rows_are_read(dtype):
    """Dead rows hold NaN, which would show in y."""
    x, _, weights = make(2, 40, 192, dtype=dtype)
    scores_TF = torch.randn(2, 192, generator=torch.Generator().manual_seed(4))
    p = Predictor("scores", (scores_TF,))
    dead = ~naive.bank_mask(scores_TF, bank=64, keep=16).any(0)
    want = run_cpu(x, p, weights)
    for w in weights:
        (w.scale_F if dtype == torch.int8 else w)[dead] = float("nan")
    assert torch.equal(run_cpu(x, p, weights), want)


@native
def test_nan_inputs_are_not_lost():
    for kind in KINDS:
        for dtype in TOLERANCE:
            x, p, weights = make(2, kind=kind, dtype=dtype)
            x[1, 7] = float("nan")
            y = run_cpu(x, p, weights)
            assert torch.isfinite(y[0]).all() and y[1].isnan().all(), (kind, dtype)


@native
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_on_any_number_of_threads(kind):
    x, p, weights = make(3, 64, 640, kind=kind, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        got = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got += [run_cpu(x, p, weights) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, got[0]) for y in got)


@native
def test_each_token_is_computed_as_if_alone():
    x, p, weights = make(8, 64, 640, dtype=torch.bfloat16)
    together = run_cpu(x, p, weights)
    alone = torch.cat([run_cpu(x[t : t + 1], p, weights) for t in range(8)])
    assert torch.equal(together, alone)
