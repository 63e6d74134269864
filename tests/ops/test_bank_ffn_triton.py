"""The Triton kernels of `bank_ffn` against the naive truth: who lives, and y; buffers poisoned.

Scores are sums in another order than the truth's, so channels whose scores are equal but for rounding may change
places. So the choice is checked against the truth's scores (exactly `keep` per bank, and nobody left out is clearly
better), and y against naive with that choice given. Where scores are given or sums exact, the choice is the truth's.

Triton fixes "interpreter or compiler" when it is first imported, so without a CUDA device this file runs itself once
more in a child process with TRITON_INTERPRET=1. The interpreter's dot knows no bfloat16, so there the kernels compute
it in fp32.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tests.interpreter import INTERPRETED, passes_interpreted
from torch import Tensor

from fallow.errors import BackendError
from fallow.ops import bank_ffn as op
from fallow.ops.activation import ACTIVATIONS
from fallow.ops.bank_ffn import Predictor, int8_rows, naive, pack_factors, pack_quantized, triton

RUNS = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the norm; fp32 under "highest"

needs_kernels = pytest.mark.skipif(not RUNS, reason="runs in the child process of test_through_the_interpreter")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install 'fallow[gpu]')"
)


@pytest.mark.skipif(RUNS, reason="this process runs the kernels already")
@needs_triton
def test_through_the_interpreter():
    passes_interpreted(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every buffer a kernel is to fill starts as NaN, or as an index far outside."""
    real = triton._empty

    def poison(*args: Any, **options: Any) -> Tensor:
        out = real(*args, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 1 << 30)

    monkeypatch.setattr(triton, "_empty", poison)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype).to(DEVICE)


def make(T: int, D: int, F: int, dtype: torch.dtype, *, int8: bool = False) -> tuple[Tensor, tuple[Any, Any, Any]]:
    """(x, weights) with activations around one."""
    x = draw(T, D, seed=1, dtype=dtype) * D**0.5
    weights = [draw(F, D, seed=s, dtype=dtype) for s in (2, 3, 4)]
    return x, tuple(int8_rows(w) for w in weights) if int8 else tuple(weights)  # type: ignore[return-value]


def predictor(how: str, T: int, D: int, F: int, *, R: int = 6, gate: Any = "one", tilt: bool = True) -> Predictor:
    """`how` is the kind, or "int8-" before a kind with factors, or "2-bit" and "4-bit" with the group after a slash."""
    kind = how.removeprefix("int8-").split("/")[0]
    tilt_F = draw(F, seed=9).abs() + 0.1 if tilt else None
    if kind == "scores":
        return Predictor("scores", (draw(T, F, seed=5),), tilt_F, gate)
    if kind in ("2-bit", "4-bit"):
        gate_FD, up_FD = draw(F, D, seed=5), draw(F, D, seed=6)
        group = int(how.split("/")[1])
        return Predictor("quantized", pack_quantized(gate_FD, up_FD, bits=int(kind[0]), group=group), tilt_F, gate)
    pairs = [t for s in (5, 7)[: 1 if kind == "linear" else 2] for t in (draw(R, D, seed=s), draw(F, R, seed=s + 1))]
    p = Predictor(kind, tuple(pairs), tilt_F, gate)  # type: ignore[arg-type]
    return pack_factors(p) if how.startswith("int8-") else p


def lives(chosen: triton.Chosen) -> Tensor:
    return chosen.coef_TF != 0


def assert_well_chosen(chosen: triton.Chosen, p: Predictor, x: Tensor, act: str, bank: int, keep: int) -> None:
    live = lives(chosen).unflatten(1, (-1, bank))
    assert (live.sum(2) == keep).all()
    truth = naive.scores(x.double(), p, act)[:, : live.shape[1] * bank].unflatten(1, (-1, bank))
    worst_alive = torch.where(live, truth, torch.inf).amin(2)
    best_dead = torch.where(live, -torch.inf, truth).amax(2)
    assert (worst_alive >= best_dead - 1e-5 * truth.abs().amax()).all()
    union = live.any(0)
    assert torch.equal(chosen.count_N.long(), union.sum(1))
    for n in range(union.shape[0]):
        listed = chosen.live_NS[n, : chosen.count_N[n]].long()
        assert torch.equal(listed, union[n].nonzero()[:, 0] + n * bank)
    if p.gate == "smooth":
        want = 2 * torch.sigmoid(truth.flatten(1))
        assert torch.allclose(chosen.coef_TF.double()[lives(chosen)], want[lives(chosen)], rtol=1e-5)


def assert_equals_naive(
    x: Tensor, p: Predictor, weights: tuple[Any, Any, Any], *, bank: int, keep: int, act: str = "silu"
) -> None:
    chosen = triton.choose(x, p, weights[1].shape[0], act=act, bank=bank, keep=keep)
    assert_well_chosen(chosen, p, x, act, bank, keep)
    got = op.bank_ffn(x, p, *weights, act=act, bank=bank, keep=keep, backend="triton")
    assert op.last_used == "triton"
    dense = [naive.dense(w, torch.float64) for w in weights]
    scores_TF = naive.scores(x.double(), p, act)[:, : chosen.coef_TF.shape[1]]
    gated = torch.where(lives(chosen), scores_TF, -torch.inf)
    given = Predictor("scores", (gated,), None, p.gate, p.compensation)
    want = naive.bank_ffn(x.double(), given, *dense, act=act, bank=bank, keep=keep)
    assert got.shape == x.shape and got.dtype == x.dtype and torch.isfinite(got).all()
    error = float((got.double() - want).norm() / want.norm())
    assert error < TOLERANCE[x.dtype], f"relative error {error:.2e}"


KINDS = ("linear", "int8-linear", "bilinear", "int8-bilinear", "4-bit/32", "2-bit/16", "scores")


@needs_kernels
def test_a_compensation_is_added():
    x, weights = make(2, 40, 48, torch.float32)
    p = predictor("linear", 2, 40, 48)._replace(
        compensation=(draw(6, 40, seed=11), draw(40, 6, seed=12), draw(40, seed=13))
    )
    assert_equals_naive(x, p, weights, bank=16, keep=4)


@needs_kernels
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("how", KINDS)
def test_kinds_of_predictors(how, T):
    x, weights = make(T, 40, 48, torch.float32)
    assert_equals_naive(x, predictor(how, T, 40, 48), weights, bank=16, keep=4)


@needs_kernels
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act):
    for T in (1, 2):
        x, weights = make(T, 24, 32, torch.float32)
        assert_equals_naive(x, predictor("bilinear", T, 24, 32), weights, bank=16, keep=5, act=act)


@needs_kernels
@pytest.mark.parametrize(
    ("T", "D", "F", "bank", "keep", "how"),
    [
        (1, 7, 3, 1, 1, "linear"),
        (2, 19, 30, 6, 6, "linear"),  # everything lives
        (4, 33, 40, 20, 3, "4-bit/48"),  # banks across blocks of 16 channels, a last group cut short
        (3, 50, 42, 42, 9, "2-bit/16"),
        (1, 70, 36, 12, 5, "4-bit/64"),
        (5, 16, 99, 9, 2, "bilinear"),
        (8, 20, 14, 2, 1, "scores"),
    ],
    ids=str,
)
@pytest.mark.parametrize("one_kernel", [True, False])
def test_ragged_sizes(T, D, F, bank, keep, how, one_kernel, monkeypatch):
    monkeypatch.setattr(triton, "ONE_KERNEL", one_kernel)
    monkeypatch.setattr(triton, "PARTS", 3)  # fewer shares of the down projection than banks
    x, weights = make(T, D, F, torch.float32)
    assert_equals_naive(x, predictor(how, T, D, F, tilt=False), weights, bank=bank, keep=keep)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["floating", "int8"])
def test_dtypes_of_weights(dtype, int8, monkeypatch):
    for T, most_width in ((1, 24), (1, 23), (4, 24)):  # 23: rows too wide for one kernel
        monkeypatch.setattr(triton, "MOST_WIDTH", most_width)
        x, weights = make(T, 24, 32, dtype, int8=int8)
        p = predictor("linear", T, 24, 32)
        assert_equals_naive(x, p._replace(tensors=tuple(t.to(dtype) for t in p.tensors)), weights, bank=16, keep=4)


@needs_kernels
@pytest.mark.parametrize("how", ["linear", "scores"])
def test_smooth_gate(how):
    for T in (1, 2):
        x, weights = make(T, 24, 32, torch.float32)
        assert_equals_naive(x, predictor(how, T, 24, 32, gate="smooth"), weights, bank=8, keep=3)


@needs_kernels
@pytest.mark.parametrize("T", [1, 4])
def test_ties_go_to_the_lower_index_and_nan_is_last(T):
    F, bank, keep = 64, 16, 4
    values = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("-inf"), float("inf")], device=DEVICE)
    at = torch.randint(0, 6, (T, F), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    s_TF = values[at]
    s_TF[:, :bank] = float("nan")
    s_TF[:, bank : 2 * bank] = 0.5
    want = naive.bank_mask(s_TF, bank=bank, keep=keep)
    assert torch.equal(op.bank_mask(s_TF, bank=bank, keep=keep, backend="triton"), want)
    chosen = triton.choose(s_TF, Predictor("scores", (s_TF,)), F, act="silu", bank=bank, keep=keep)
    assert torch.equal(lives(chosen), want)


@needs_kernels
@pytest.mark.parametrize("how", ["linear", "int8-linear", "bilinear", "4-bit/16", "2-bit/16"])
def test_choice_is_the_truths_where_sums_are_exact(how):
    """Small whole numbers, so that many scores are equal: their order is by index alone."""
    T, D, F, R, bank, keep = 3, 16, 32, 4, 16, 5
    g = torch.Generator().manual_seed(8)
    x = torch.randint(-2, 3, (T, D), generator=g).float().to(DEVICE)
    x[:, 0] = 127  # so that bytes of x have a step of one

    def whole(*shape: int) -> Tensor:
        drawn = torch.randint(-1, 2, shape, generator=g).float()
        drawn[:, 0] = 127.0 if how.startswith("int8") else 7.5 if "bit" in how else 1.0
        return drawn.to(DEVICE)

    if "bit" in how:
        p = Predictor("quantized", pack_quantized(whole(F, D), whole(F, D), bits=int(how[0]), group=16))
    else:
        kind: Any = how.removeprefix("int8-")
        p = Predictor(kind, tuple(whole(*s) for s in ((R, D), (F, R)) * (1 if kind == "linear" else 2)))
        p = pack_factors(p) if how.startswith("int8") else p
    truth = naive.scores(x.double(), p, "relu")
    assert torch.equal(naive.scores(x, p, "relu").double(), truth)
    assert truth.unflatten(1, (-1, bank)).sort(2).values.diff(dim=2).eq(0).any()
    chosen = triton.choose(x, p, F, act="relu", bank=bank, keep=keep)
    assert torch.equal(lives(chosen), naive.bank_mask(truth, bank=bank, keep=keep))


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("T", "F", "bank", "keep"), [(5, 60, 12, 5), (3, 128, 64, 16), (2, 7, 1, 1), (0, 8, 4, 1)])
def test_mask(T, F, bank, keep, dtype):
    s_TF = draw(T, F, seed=1, dtype=dtype).mul(4).round().to(dtype) / 4
    got = op.bank_mask(s_TF, bank=bank, keep=keep, backend="triton")
    assert got.dtype == torch.bool and torch.equal(got, naive.bank_mask(s_TF, bank=bank, keep=keep))
    turned = s_TF.t().contiguous().t()
    assert torch.equal(op.bank_mask(turned, bank=bank, keep=keep, backend="triton"), got)


@needs_kernels
def test_other_layouts_and_shapes():
    x, (gate, up, down) = make(2, 24, 32, torch.float32)
    p = predictor("linear", 2, 24, 32)
    how = {"act": "silu", "bank": 8, "keep": 2, "backend": "triton"}
    want = op.bank_ffn(x, p, gate, up, down, **how)
    turned = [t.t().contiguous().t() for t in (x, gate, up, down)]
    assert torch.equal(op.bank_ffn(turned[0], p, *turned[1:], **how), want)
    assert torch.equal(op.bank_ffn(x[:, None], p, gate, up, down, **how), want[:, None])
    beside = op.side_by_side(gate, up, down)
    assert torch.equal(op.bank_ffn(x, p, *beside, **how), want)
    assert torch.equal(op.bank_ffn(x[:1], p, *beside, **how), op.bank_ffn(x[:1], p, gate, up, down, **how))
    rows = triton._rows_apart(*beside)  # decoding lays weights out so: a copy would read all of them
    assert [r.data_ptr() for r in rows] == [b.data_ptr() for b in beside]
    assert op.bank_ffn(x[:0], p, gate, up, down, **how).shape == (0, 24)


@needs_kernels
def test_the_same_bits_again():
    for T in (1, 2):
        x, weights = make(T, 24, 64, torch.float32)
        p = predictor("4-bit/16", T, 24, 64)
        how = {"act": "silu", "bank": 16, "keep": 4, "backend": "triton"}
        assert torch.equal(op.bank_ffn(x, p, *weights, **how), op.bank_ffn(x, p, *weights, **how))


@needs_kernels
def test_registered_for_compile():
    x, weights = make(1, 24, 32, torch.float32)
    p = predictor("bilinear", 1, 24, 32)

    def call(x: Tensor) -> Tensor:
        return op.bank_ffn(x, p, *weights, act="silu", bank=8, keep=2, backend="triton") + 1

    with torch.no_grad():
        assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x))


@needs_kernels
def test_what_it_does_not_serve():
    x, weights = make(9, 24, 32, torch.float32)
    p, how = predictor("linear", 9, 24, 32), {"act": "silu", "bank": 8, "keep": 2}
    with pytest.raises(BackendError, match="9 tokens"):
        op.bank_ffn(x, p, *weights, **how, backend="triton")
    op.bank_ffn(x, p, *weights, **how)
    assert op.last_used != "triton"
    with pytest.raises(BackendError, match="float64"):
        op.bank_ffn(x[:1].double(), p, *(w.double() for w in weights), **how, backend="triton")
    with pytest.raises(BackendError, match="banks of 512"):
        op.bank_mask(torch.zeros(1, 512, device=DEVICE), bank=512, keep=1, backend="triton")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_chosen_for_cuda_tensors_only():
    with pytest.raises(BackendError, match=r"cpu|no CUDA device"):
        op.bank_mask(torch.zeros(1, 8), bank=4, keep=1, backend="triton")
