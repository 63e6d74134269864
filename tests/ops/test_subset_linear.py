"""`subset_linear`: every backend equals plain indexing in value and in each gradient, by name, on ragged shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import BackendError, ConfigError
from fallow.ops import subset_linear as op
from fallow.ops.subset_linear import subset_linear

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory a kernel forgot to write is NaN, never a lucky zero."""
    filled, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def _inputs(*, tokens, n_out, n_in, kept, block, side, transposed, bias, dtype, seed=0):
    """Random leaves and the index: `n_out`, `n_in` and `kept` count blocks on the indexed side."""
    g = torch.Generator().manual_seed(seed)
    out_size, in_size = (n_out * block, n_in) if side == "rows" else (n_out, n_in * block)
    stored = (
        torch.randn((in_size, out_size) if transposed else (out_size, in_size), generator=g).to(dtype).requires_grad_()
    )
    index = torch.randperm(n_out if side == "rows" else n_in, generator=g)[:kept].sort().values
    x = torch.randn(*tokens, in_size if side == "rows" else kept * block, generator=g).to(dtype).requires_grad_()
    b = torch.randn(out_size, generator=g).to(dtype).requires_grad_() if bias else None
    dy = torch.randn(*tokens, kept * block if side == "rows" else out_size, generator=g).to(dtype)
    return x, stored, b, index, dy


def _run(backend, x, stored, b, index, dy, *, block, side, transposed):
    weight = stored.t() if transposed else stored
    rows, cols = (index, None) if side == "rows" else (None, index)
    y = subset_linear(x, weight, b, rows, cols, block=block, backend=backend)
    leaves = {"x": x, "weight": stored} | ({} if b is None else {"bias": b})
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{n}": grad for n, grad in zip(leaves, grads, strict=True)}


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    n_out=st.integers(1, 6),
    n_in=st.integers(1, 6),
    share=st.floats(0, 1),
    block=st.sampled_from([1, 2, 5]),
    side=st.sampled_from(["rows", "cols"]),
    transposed=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_cpu_matches_naive(tokens, n_out, n_in, share, block, side, transposed, bias, dtype):
    n = n_out if side == "rows" else n_in
    case = {"block": block, "side": side, "transposed": transposed}
    data = _inputs(tokens=tokens, n_out=n_out, n_in=n_in, kept=max(1, round(share * n)), bias=bias, dtype=dtype, **case)
    truth, ours = _run("naive", *data, **case), _run("cpu", *data, **case)
    tol = TOLERANCE[dtype]
    for name, expected in truth.items():
        assert ours[name].dtype == expected.dtype, name
        torch.testing.assert_close(ours[name], expected, rtol=tol, atol=tol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("side", ["rows", "cols"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_of_what_is_left_out_is_zero_and_in_the_weights_layout(side, transposed):
    case = {"block": 4, "side": side, "transposed": transposed}
    x, stored, b, index, dy = _inputs(tokens=[9], n_out=6, n_in=5, kept=2, bias=True, dtype=torch.float32, **case)
    out = _run("cpu", x, stored, b, index, dy, **case)
    assert out["dweight"].stride() == stored.stride()
    dw_OI = out["dweight"].t() if transposed else out["dweight"]
    blocks = dw_OI.unflatten(0 if side == "rows" else 1, (-1, 4)).transpose(0, 0 if side == "rows" else 1)
    left_out = [i for i in range(blocks.shape[0]) if i not in index.tolist()]
    assert blocks[left_out].abs().max() == 0
    assert blocks[index].abs().amin() > 0


def test_keeping_everything_equals_linear():
    x, w, b, _, _ = _inputs(
        tokens=[3, 4], n_out=6, n_in=8, kept=1, block=1, side="rows", transposed=False, bias=True, dtype=torch.float32
    )
    expected = torch.nn.functional.linear(x, w, b)
    assert torch.equal(subset_linear(x, w, b, None, None), expected)
    torch.testing.assert_close(subset_linear(x, w, b, torch.arange(6), None), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(subset_linear(x, w, b, None, torch.arange(2), block=4), expected, rtol=1e-6, atol=1e-6)


def test_frozen_weight_costs_no_gradient():
    x, w, b, index, dy = _inputs(
        tokens=[5], n_out=6, n_in=8, kept=3, block=1, side="rows", transposed=False, bias=True, dtype=torch.float32
    )
    frozen = w.detach()
    y = subset_linear(x, frozen, b, index, None, backend="cpu")
    dx, db = torch.autograd.grad(y, [x, b], dy)
    torch.testing.assert_close(dx, dy @ frozen[index], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db[index], dy.sum(0))


@pytest.mark.parametrize("backend", ["cpu", "naive"])
def test_autocast_computes_in_the_autocast_dtype(backend):
    x, w, b, index, dy = _inputs(
        tokens=[5], n_out=6, n_in=8, kept=3, block=1, side="rows", transposed=False, bias=True, dtype=torch.float32
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = subset_linear(x, w, b, index, None, backend=backend)
    assert y.dtype == torch.bfloat16
    dw = torch.autograd.grad(y, w, dy.bfloat16())[0]
    assert dw.dtype == torch.float32
    torch.testing.assert_close(dw[index], dy.t() @ x, rtol=3e-2, atol=3e-2)


def test_registered_op_passes_torchs_own_checks():
    x, w, b, index, _ = _inputs(
        tokens=[5], n_out=3, n_in=8, kept=2, block=2, side="rows", transposed=False, bias=True, dtype=torch.float32
    )
    torch.library.opcheck(torch.ops.fallow.subset_linear.default, (x, w, b, index, 2, 0))
    assert op.last_used in {"cpu", "naive", "none yet"}


def test_compile_keeps_the_op_in_one_graph():
    x, w, b, index, dy = _inputs(
        tokens=[5], n_out=3, n_in=8, kept=2, block=2, side="rows", transposed=False, bias=True, dtype=torch.float32
    )

    def step(x, w, b, index):
        return torch.relu(subset_linear(x, w, b, index, None, block=2, backend="cpu"))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for name, ours, expected in zip(
        ("x", "weight", "bias"),
        torch.autograd.grad(compiled(x, w, b, index), [x, w, b], dy),
        torch.autograd.grad(step(x, w, b, index), [x, w, b], dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, msg=lambda m, name=name: f"d{name}: {m}")


def test_bad_use_names_the_mend():
    x, w = torch.ones(2, 4), torch.ones(6, 4)
    with pytest.raises(ConfigError, match="not both"):
        subset_linear(x, w, None, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ConfigError, match="block=4 does not divide the 6"):
        subset_linear(x, w, None, torch.tensor([0]), None, block=4)
    with pytest.raises(BackendError, match="it has cpu, naive"):
        subset_linear(x, w, None, torch.tensor([0]), None, backend="fpga")
