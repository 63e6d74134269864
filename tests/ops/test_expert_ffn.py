"""`expert_ffn`: the CPU kernels equal the loop over experts in value and gradients, by name, on ragged shapes and
in poisoned memory; with K = E both are the dense FFN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.expert_cases import (
    DTYPES,
    assert_close,
    assert_equals_naive,
    call,
    choose,
    double,
    gradient_like,
    make,
    native,
    poisoned_memory,  # noqa: F401  # in every test of this file
    run,
)

from fallow.ops import expert_ffn as op
from fallow.ops.activation import ACTIVATIONS, activation
from fallow.ops.expert_ffn import cpu


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
