"""`expert_ffn`: the CPU kernels equal the loop over experts in value and gradients, by name, on ragged shapes and
in poisoned memory; with K = E both are the dense FFN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import BackendError, ConfigError
from fallow.ops import expert_ffn as op
from fallow.ops import reuse
from fallow.ops.activation import ACTIVATIONS, activation
from fallow.ops.expert_ffn import cpu, expert_ffn

# relative Frobenius error against fp64: fp32 sums cancel; bf16 rounds the preactivations, the hidden layer and each
# expert's output, by 2^-8 at most each
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]
BIASES = ("b_gate", "b_up", "b_down")
native = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory a kernel forgot to write is NaN, never a lucky zero: fresh from torch, or reused."""
    real = reuse.empty
    monkeypatch.setattr(reuse, "empty", lambda *arguments: real(*arguments).fill_(float("nan")))
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[0]


def choose(T: int, E: int, K: int, g: torch.Generator, *, unused: bool = False) -> torch.Tensor:
    """int64 [T, K], distinct per row; with `unused`, the middle expert gets no token where K leaves one out."""
    score_TE = torch.rand(T, E, generator=g)
    if unused and K < E:
        score_TE[:, E // 2] = -1
    return score_TE.topk(K, dim=1).indices


def make(
    T=37, D=24, C=16, E=4, K=2, *, gated=True, bias=True, coefficient=True, dtype=torch.float32, unused=True, seed=0
):
    """(leaves by name, choice)."""
    g = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"x": (T, D), "w_up": (E * C, D), "w_down": (D, E * C)}
    if gated:
        shapes["w_gate"] = (E * C, D)
    if bias:
        shapes |= {"b_up": (E * C,), "b_down": (D,)} | ({"b_gate": (E * C,)} if gated else {})
    leaves = {n: (torch.randn(s, generator=g) / s[-1] ** 0.5).to(dtype).requires_grad_() for n, s in shapes.items()}
    if coefficient:
        leaves["coefficient"] = torch.ones(T, K, requires_grad=True)
    return leaves, choose(T, E, K, g, unused=unused)


def call(leaves: dict[str, Any], choice, *, act="relu", experts=4, backend=None):
    return expert_ffn(
        leaves["x"],
        choice,
        leaves.get("coefficient"),
        leaves.get("w_gate"),
        leaves["w_up"],
        leaves["w_down"],
        *(leaves.get(n) for n in BIASES),
        act=act,
        experts=experts,
        backend=backend,
    )


def run(leaves, choice, dy, **options) -> dict[str, torch.Tensor]:
    y = call(leaves, choice, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d {n}": t for n, t in zip(leaves, grads, strict=True)}


def gradient_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)


def double(leaves):
    return {n: t.detach().double().requires_grad_() for n, t in leaves.items()}


def assert_close(got, want, dtype, same_dtype=None):
    """Within the tolerance; where few numbers cancel, within twice what naive loses in the same dtype."""
    assert got.keys() == want.keys()
    for name, truth in want.items():
        expected = torch.float32 if name == "d coefficient" else dtype
        assert got[name].dtype == expected and got[name].shape == truth.shape, name
        assert torch.isfinite(got[name]).all(), f"{name} has entries that were never written"
        scale = truth.norm().clamp_min(1e-30)
        error = (got[name].double() - truth).norm() / scale
        own = 0.0 if same_dtype is None else (same_dtype[name].double() - truth).norm() / scale
        assert error <= max(TOLERANCE[dtype], 2 * own), f"{name}: relative error {error:.1e}, naive's {own:.1e}"


def assert_equals_naive(leaves, choice, *, act="relu", experts=4, backend="cpu"):
    dy, dtype = gradient_like(leaves["x"]), leaves["x"].dtype
    got = run(leaves, choice, dy, act=act, experts=experts, backend=backend)
    want = run(double(leaves), choice, dy.double(), act=act, experts=experts, backend="naive")
    same_dtype = run(leaves, choice, dy, act=act, experts=experts, backend="naive")
    assert_close(got, want, dtype, same_dtype)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_cpu_matches_naive(act, dtype, gated, bias):
    for C in (16, 21, 70):
        leaves, choice = make(C=C, gated=gated, bias=bias, dtype=dtype)
        assert_equals_naive(leaves, choice, act=act)
    assert op.last_used == "naive"
    call(leaves, choice, act=act)
    assert op.last_used == "cpu", "the backend chosen without being named"


@native
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(("T", "D", "C"), [(1, 24, 16), (3, 1, 20), (9, 24, 1), (2, 5, 3)])
def test_small_sizes(T, D, C, K):
    assert_equals_naive(*make(T, D, C, K=K), act="silu")


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_experts_shared_out_over_threads(monkeypatch, threads, dtype):
    """The same bits on any number of threads: an expert is computed by one thread, and sums have a fixed order."""
    monkeypatch.setattr(cpu, "_SMALL", 0)
    before = torch.get_num_threads()
    leaves, choice = make(T=150, C=48, E=8, K=3, dtype=dtype)
    dy = gradient_like(leaves["x"])
    try:
        torch.set_num_threads(threads)
        got = run(leaves, choice, dy, experts=8, backend="cpu")
        torch.set_num_threads(1)
        alone = run(leaves, choice, dy, experts=8, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert_close(got, run(double(leaves), choice, dy.double(), experts=8, backend="naive"), dtype)
    for name, value in alone.items():
        assert torch.equal(got[name], value), name


@native
@settings(max_examples=60, deadline=None)
@given(
    # with a few numbers a sum may cancel, and no tolerance relative to it holds; small sizes have a test of their own
    T=st.just(0) | st.integers(8, 40),
    D=st.integers(8, 90),
    C=st.integers(8, 80),
    E=st.integers(1, 9),
    K=st.integers(1, 9),
    gated=st.booleans(),
    bias=st.booleans(),
    coefficient=st.booleans(),
    unused=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_cpu_matches_naive_on_any_shape(T, D, C, E, K, gated, bias, coefficient, unused, dtype, act, seed):
    K = min(K, E)
    options: dict[str, Any] = {"gated": gated, "bias": bias, "coefficient": coefficient, "unused": unused}
    leaves, choice = make(T, D, C, E, K, **options, dtype=dtype, seed=seed)
    assert_equals_naive(leaves, choice, act=act, experts=E)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_all_experts_chosen_is_the_dense_ffn(dtype, gated):
    leaves, _ = make(T=29, K=4, gated=gated, coefficient=False, dtype=dtype)
    choice = choose(29, 4, 4, torch.Generator().manual_seed(3))
    dy = gradient_like(leaves["x"])
    got = run(leaves, choice, dy, backend="cpu")
    d = double(leaves)
    up = F.linear(d["x"], d["w_up"], d["b_up"])
    h = activation(F.linear(d["x"], d["w_gate"], d["b_gate"]), "relu") * up if gated else activation(up, "relu")
    y = F.linear(h, d["w_down"], d["b_down"])
    grads = torch.autograd.grad(y, list(d.values()), dy.double())
    assert_close(got, {"y": y.detach()} | {f"d {n}": t for n, t in zip(d, grads, strict=True)}, dtype)


def test_naive_coefficient_gradient_is_the_product_with_the_experts_output():
    leaves, choice = make(bias=False)
    d, dy = double(leaves), gradient_like(leaves["x"]).double()
    got = run(d, choice, dy, backend="naive")["d coefficient"]
    for t, k in ((0, 0), (5, 1), (36, 0)):
        alone = call({**d, "coefficient": None, "x": d["x"][t : t + 1]}, choice[t : t + 1, k : k + 1], backend="naive")
        torch.testing.assert_close(got[t, k], (alone[0] * dy[t]).sum())


@native
def test_unchosen_expert_has_zero_gradient_and_nothing_else_is_zero():
    leaves, choice = make(C=8)
    got = run(leaves, choice, gradient_like(leaves["x"]), act="silu", backend="cpu")
    own = slice(16, 24)  # of expert 2 of 4
    assert not (choice == 2).any()
    for name, dim in (("w_gate", 0), ("w_up", 0), ("w_down", 1), ("b_gate", 0), ("b_up", 0)):
        zero = (got[f"d {name}"] == 0).movedim(dim, 0)
        assert zero[own].all() and not zero[:16].any() and not zero[24:].any(), name


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_any_strides(dtype):
    """Conv1D keeps transposed weights, Phi-3 one fused matrix of gate and up."""
    leaves, choice = make(bias=False, dtype=dtype)
    turned = {n: t.detach() for n, t in leaves.items()}
    turned |= {n: t.detach().t().contiguous().t().requires_grad_() for n, t in leaves.items() if n.startswith("w_")}
    turned["x"] = leaves["x"].detach().t().contiguous().t().requires_grad_()
    turned["coefficient"].requires_grad_()
    assert_equals_naive(turned, choice)
    fused = torch.cat([leaves["w_gate"], leaves["w_up"]]).detach().requires_grad_()
    dy = gradient_like(leaves["x"])
    gate, up = fused.chunk(2)
    call({**leaves, "w_gate": gate, "w_up": up}, choice, backend="cpu").backward(dy)
    want = run(leaves, choice, dy, backend="cpu")
    assert fused.grad is not None and torch.equal(fused.grad, torch.cat([want["d w_gate"], want["d w_up"]]))


@native
def test_leading_dimensions_and_repeated_backward():
    leaves, choice = make(T=36)
    flat = call(leaves, choice, backend="cpu")
    batched = call({**leaves, "x": leaves["x"].view(3, 12, -1)}, choice, backend="cpu")
    assert torch.equal(batched, flat.view(3, 12, -1))
    dy = gradient_like(flat)
    first = torch.autograd.grad(flat, leaves["w_up"], dy, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(flat, leaves["w_up"], dy)[0])


@native
@pytest.mark.parametrize("wanted", [["x"], ["w_down"], ["b_up"], ["coefficient"], ["w_gate", "x"], ["b_down"]])
def test_only_what_is_asked_for(wanted):
    leaves, choice = make()
    dy = gradient_like(leaves["x"])
    want = run(leaves, choice, dy, backend="cpu")
    some = {n: t.detach().requires_grad_(n in wanted) for n, t in leaves.items()}
    grads = torch.autograd.grad(call(some, choice, backend="cpu"), [some[n] for n in wanted], dy)
    for name, got in zip(wanted, grads, strict=True):
        assert torch.equal(got, want[f"d {name}"]), name


@native
@pytest.mark.parametrize("gated", [True, False])
def test_compiles_without_a_break(gated):
    leaves, choice = make(gated=gated)
    dy = gradient_like(leaves["x"])
    want = run(leaves, choice, dy, backend="cpu")
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    y = compiled(leaves, choice, backend="cpu")
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    for name, a, b in zip(want, (y, *grads), want.values(), strict=True):
        assert torch.equal(a.detach(), b), name


@native
@pytest.mark.parametrize("gated", [True, False])
def test_registration_is_sound(gated):
    leaves, choice = make(T=6, D=8, C=4, gated=gated)
    weights = [leaves.get(n) for n in ("w_gate", "w_up", "w_down", *BIASES)]
    arguments = (leaves["x"], choice, leaves["coefficient"], *weights, "relu", 4, "cpu")
    # the AOT check re-runs the op on NaN-poisoned outputs it treats as free to differ
    torch.library.opcheck(
        op.op.forward, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_autocast_computes_in_its_dtype():
    leaves, choice = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(leaves, choice)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert leaves["w_up"].grad.dtype == torch.float32


def test_other_dtypes_take_the_naive_form():
    leaves, choice = make()
    assert call(double(leaves), choice).dtype == torch.float64
    assert op.last_used == "naive"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"act": "tanh"}, "act='tanh' is not one of silu"),
        ({"experts": 5}, "5 experts do not divide 64 channels"),
        ({"experts": 0}, "0 experts"),
        ({"w_down": torch.zeros(64, 24)}, "shapes do not fit"),
        ({"w_gate": torch.zeros(60, 24)}, "shapes do not fit"),
        ({"choice": torch.zeros(36, 2, dtype=torch.int64)}, "37 tokens"),
        ({"choice": torch.zeros(37, 5, dtype=torch.int64)}, "1 to 4"),
        ({"choice": torch.zeros(37, 2, dtype=torch.int32)}, "int64"),
        ({"coefficient": torch.ones(37, 3)}, "coefficient is"),
    ],
)
def test_bad_input_says_what_to_do(change, match):
    leaves, choice = make()
    options = {n: change.pop(n) for n in ("act", "experts") if n in change}
    choice = change.pop("choice", choice)
    with pytest.raises(ConfigError, match=match):
        call({**leaves, **change}, choice, **options)


@native
@pytest.mark.parametrize("expert", [-1, 4])
def test_expert_out_of_range(expert):
    leaves, choice = make()
    choice[3, 1] = expert
    with pytest.raises(ConfigError, match="there are 0 to 3"):
        call(leaves, choice, backend="cpu")


def test_backend_that_cannot_run():
    leaves, choice = make()
    with pytest.raises(BackendError, match="no backend 'gpu'; it has triton, cpu, naive"):
        call(leaves, choice, backend="gpu")
    with pytest.raises(BackendError, match="float64"):
        call(double(leaves), choice, backend="cpu")
