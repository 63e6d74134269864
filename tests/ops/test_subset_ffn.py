"""subset_ffn: the CPU path equals the naive truth in value and in each gradient, by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.bench.gate import relative_error
from fallow.errors import BackendError, ConfigError
from fallow.ops.activation import ACTIVATIONS
from fallow.ops.subset_ffn import cpu, subset_ffn


def make(T, D, F, dtype, *, gated, biased, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    t = {"x": randn(T, D), "w_up": randn(F, D), "w_down": randn(D, F)}
    if gated:
        t["w_gate"] = randn(F, D)
    if biased:
        t |= {"b_up": randn(F), "b_down": randn(D)} | ({"b_gate": randn(F)} if gated else {})
    return t


def run(t, idx, backend, act, omit_in, dy):
    t = {k: v.detach().clone().requires_grad_() for k, v in t.items()}
    y = subset_ffn(
        t["x"],
        t["w_up"],
        t["w_down"],
        idx,
        w_gate_FD=t.get("w_gate"),
        b_gate_F=t.get("b_gate"),
        b_up_F=t.get("b_up"),
        b_down_D=t.get("b_down"),
        act=act,
        omit_in=omit_in,
        backend=backend,
    )
    y.backward(dy)
    return {"y": y.detach()} | {f"d{k}": v.grad for k, v in t.items()}


def poisoned_scratch(monkeypatch):
    """Every reused buffer starts as NaN, so a row that is read but was not written shows."""
    real = cpu._scratch
    monkeypatch.setattr(cpu, "_scratch", lambda *a: real(*a).fill_(float("nan")))


def assert_same(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) <= tolerance, (
            f"{name}: {relative_error(got[name], want[name]):.2e}"
        )


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(2, 33),
    D=st.integers(1, 20),
    F=st.integers(2, 40),
    gated=st.booleans(),
    biased=st.booleans(),
    act=st.sampled_from(ACTIVATIONS),
    omit_in=st.sampled_from(["forward+backward", "backward", "weight_grad"]),
    sequences=st.sampled_from([0, 2]),
    data=st.data(),
)
def test_cpu_equals_naive_fp32(T, D, F, gated, biased, act, omit_in, sequences, data):
    T -= T % max(sequences, 1)
    K = data.draw(st.integers(1, F))
    rows = [
        torch.randperm(F, generator=torch.Generator().manual_seed(s))[:K].sort().values for s in range(sequences or 1)
    ]
    idx = torch.stack(rows) if sequences else rows[0]
    t = make(T, D, F, torch.float32, gated=gated, biased=biased)
    dy = torch.randn(T, D, generator=torch.Generator().manual_seed(9))
    want = run({k: v.double() for k, v in t.items()}, idx, "naive", act, omit_in, dy.double())
    assert_same(run(t, idx, "cpu", act, omit_in, dy), want, 2e-5)


@pytest.mark.parametrize("omit_in", ["forward+backward", "backward", "weight_grad"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_cpu_equals_naive_bf16_on_poisoned_buffers(act, omit_in, monkeypatch):
    poisoned_scratch(monkeypatch)
    t = make(65, 32, 96, torch.bfloat16, gated=True, biased=False)
    idx = torch.randperm(96, generator=torch.Generator().manual_seed(1))[:40].sort().values
    dy = torch.randn(65, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    want = run({k: v.double() for k, v in t.items()}, idx, "naive", act, omit_in, dy.double())
    assert_same(run(t, idx, "cpu", act, omit_in, dy), want, 2e-2)


def test_omitted_rows_get_exactly_zero_gradient():
    t = make(16, 8, 24, torch.float32, gated=True, biased=False)
    idx = torch.arange(0, 24, 3)
    grads = run(t, idx, "cpu", "silu", "forward+backward", torch.ones(16, 8))
    omitted = torch.ones(24, dtype=torch.bool)
    omitted[idx] = False
    for name, rows in (("dw_gate", grads["dw_gate"]), ("dw_up", grads["dw_up"]), ("dw_down", grads["dw_down"].t())):
        assert torch.count_nonzero(rows[omitted]) == 0, name
        assert torch.count_nonzero(rows[idx]) > 0, name


def test_backward_only_forward_is_the_dense_forward():
    t = make(16, 8, 24, torch.float32, gated=True, biased=False)
    dense = run(t, None, "naive", "silu", "forward+backward", torch.ones(16, 8))["y"]
    sparse = run(t, torch.arange(12), "cpu", "silu", "backward", torch.ones(16, 8))["y"]
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


def test_weight_grad_only_is_dense_but_for_omitted_weights():
    t = make(16, 8, 24, torch.float32, gated=True, biased=True)
    idx = torch.arange(0, 24, 3)
    dense = run(t, None, "naive", "silu", "forward+backward", torch.ones(16, 8))
    sparse = run(t, idx, "cpu", "silu", "weight_grad", torch.ones(16, 8))
    for name, value in dense.items():
        if name in ("y", "dx", "db_down"):
            assert torch.allclose(sparse[name], value, atol=1e-6), name
            continue
        got, want = (v.t() if name == "dw_down" else v for v in (sparse[name], value))
        kept = torch.zeros(24, dtype=torch.bool).index_fill(0, idx, True)
        assert torch.allclose(got[kept], want[kept], atol=1e-5), name
        assert torch.count_nonzero(got[~kept]) == 0, name


def test_backward_only_saves_only_kept_activations():
    t = make(64, 8, 64, torch.float32, gated=True, biased=False)
    x = t["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s.shape) or s, lambda s: s):
        subset_ffn(
            x, t["w_up"], t["w_down"], torch.arange(16), w_gate_FD=t["w_gate"], omit_in="backward", backend="cpu"
        )
    assert (64, 2 * 16) in saved
    assert all(shape[0] != 64 or shape[1] <= 32 for shape in saved if len(shape) == 2 and shape != (64, 8))


def test_frozen_weights_cost_no_gradient():
    t = make(16, 8, 24, torch.float32, gated=True, biased=False)
    x = t["x"].requires_grad_()
    subset_ffn(x, t["w_up"], t["w_down"], torch.arange(8), w_gate_FD=t["w_gate"], backend="cpu").sum().backward()
    assert x.grad is not None and t["w_up"].grad is None


def test_compiles_as_one_graph():
    t = make(16, 8, 24, torch.float32, gated=True, biased=False)
    t = {k: v.requires_grad_() for k, v in t.items()}
    idx = torch.arange(12)

    def f(x):
        return subset_ffn(x * 2, t["w_up"], t["w_down"], idx, w_gate_FD=t["w_gate"], backend="cpu").sum()

    torch._dynamo.reset()
    want = torch.autograd.grad(f(t["x"]), t["x"])[0]
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(t["x"]), t["x"])[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dense_forward", [False, True])
def test_registered_op_is_sound(dense_forward):
    t = make(6, 4, 12, torch.float32, gated=True, biased=True)
    args = [t[k].requires_grad_() for k in ("x", "w_up", "w_down")]
    rest = (torch.arange(6), t["w_gate"], t["b_gate"], t["b_up"], t["b_down"], "silu", dense_forward)
    torch.library.opcheck(torch.ops.fallow.subset_ffn_cpu.default, (*args, *rest))


@pytest.mark.parametrize("dim", [0, 1])
def test_registered_weight_grad_is_sound(dim):
    dy, x = torch.randn(6, 12 if dim == 0 else 4), torch.randn(6, 4 if dim == 0 else 12)
    torch.library.opcheck(torch.ops.fallow.partial_weight_grad.default, (dy, x, torch.arange(0, 12, 2), dim, 12))


def test_weight_grad_only_under_autocast():
    t = make(8, 4, 12, torch.float32, gated=True, biased=True)
    leaves = {k: t[k].requires_grad_() for k in ("x", "w_up", "w_down", "w_gate", "b_gate", "b_up", "b_down")}
    biases = {f"{k}_{'D' if k == 'b_down' else 'F'}": leaves[k] for k in ("b_gate", "b_up", "b_down")}
    with torch.autocast("cpu", torch.bfloat16):
        y = subset_ffn(
            leaves["x"], leaves["w_up"], leaves["w_down"], torch.arange(6), w_gate_FD=leaves["w_gate"], **biases,
            omit_in="weight_grad", backend="cpu",
        )  # fmt: skip
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in leaves.values())


def test_bad_arguments_name_the_mend():
    t = make(4, 4, 8, torch.float32, gated=False, biased=False)
    with pytest.raises(ConfigError, match="silu, gelu"):
        subset_ffn(t["x"], t["w_up"], t["w_down"], None, act="swish")
    with pytest.raises(ConfigError, match="forward\\+backward"):
        subset_ffn(t["x"], t["w_up"], t["w_down"], None, omit_in="forward")
    with pytest.raises(BackendError, match="naive"):
        subset_ffn(t["x"], t["w_up"], t["w_down"], None, backend="cuda")
