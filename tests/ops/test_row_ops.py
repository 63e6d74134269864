"""`row_linear` and `row_attention`: the compiled kernels equal torch on ragged shapes, eagerly and inside a graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import BackendError, ConfigError
from fallow.ops import native
from fallow.ops import row_attention as attention_op
from fallow.ops import row_linear as linear_op
from fallow.ops.row_attention import row_attention
from fallow.ops.row_linear import row_linear

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
needs_native = pytest.mark.skipif(not native.available()[0], reason="no compiled kernels on this machine")


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


def assert_close(name: str, found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest entry; a bf16 result may be half a unit of its last place off."""
    assert found.dtype == dtype and found.shape == truth.shape, name
    error = (found.double() - truth).abs().max() / truth.abs().max()
    assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def _linears(dtype, rows, width, sizes, seed=0, by_inputs=()):
    """Weights whose number is in `by_inputs` lie input by input in memory; odd ones lie apart, with NaN between."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, width, generator=g).to(dtype)
    weights = [torch.randn(o, width, generator=g).to(dtype) for o in sizes]
    biases = [torch.randn(o, generator=g).to(dtype) if i % 2 else None for i, o in enumerate(sizes)]
    weights = [w.t().contiguous().t() if i in by_inputs else w for i, w in enumerate(weights)]
    for i in range(1, len(weights), 2):
        w = weights[i].t() if i in by_inputs else weights[i]
        apart = torch.cat([w, torch.full((w.shape[0], 5), torch.nan, dtype=dtype)], 1)[:, : w.shape[1]]
        weights[i] = apart.t() if i in by_inputs else apart
    return x, weights, biases


def _doubled(x, weights, biases):
    return x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases]


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([(1,), (1, 1), (2, 3), (8,), (7,)]),
    width=st.sampled_from([1, 15, 32, 33, 100, 576]),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    by_inputs=st.sets(st.integers(0, 3)),
    dtype=st.sampled_from(DTYPES),
)
def test_linears_equal_torch(rows, width, sizes, by_inputs, dtype):
    given_ = _linears(dtype, rows, width, sizes, by_inputs=by_inputs)
    truth = row_linear(*_doubled(*given_), backend="naive")
    assert_close("y", row_linear(*given_, backend="cpu"), truth, dtype)


@needs_native
def test_large_linears_are_shared_out_among_threads():
    given_ = _linears(torch.bfloat16, (1,), 512, [3001, 2570, 257], by_inputs=(1,))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        y = row_linear(*given_, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert_close("y", y, row_linear(*_doubled(*given_), backend="naive"), torch.bfloat16)


def _attention(dtype, B, H, G, L, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, H, d), (B, G, L, d), (B, G, L, d))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 11),
    length=st.integers(1, 50),
    lines=st.integers(1, 3),
    masks=st.sampled_from(["none", "one", "each"]),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_equals_torch(batch, groups, per_group, length, lines, masks, dtype):
    d = lines * (16 if dtype == torch.float32 else 32)
    q, k, v = _attention(dtype, batch, groups * per_group, groups, length, d)
    mask = None
    if masks != "none":
        mask = torch.rand(1 if masks == "one" else batch, length, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[:, length // 2] = True
    truth = row_attention(q.double(), k.double(), v.double(), mask, d**-0.5, backend="naive")
    assert_close("y", row_attention(q, k, v, mask, d**-0.5, backend="cpu"), truth, dtype)


@needs_native
def test_attention_reads_strided_caches_and_no_closed_place():
    q, k, v = _attention(torch.float32, 1, 4, 2, 9, 16)
    k[:, :, 5:], v[:, :, 5:] = torch.nan, torch.nan
    mask = (torch.arange(9) < 5)[None]
    across = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    truth = row_attention(q.double(), k[:, :, :5].double(), v[:, :, :5].double(), None, 0.25, backend="naive")
    for keys, values in ((k, v), across):
        found = row_attention(q, keys, values, mask, 0.25, backend="cpu")
        assert_close("y", found, truth, torch.float32)


@needs_native
def test_ops_are_nodes_of_a_compiled_graph():
    x, weights, biases = _linears(torch.float32, (1, 1), 32, [16, 8])
    q, k, v = _attention(torch.float32, 1, 2, 1, 5, 16)

    def step(x, q):
        y = torch.ops.fallow.row_linear(x, weights, biases)
        return y * 2, torch.ops.fallow.row_attention(q, k, v, None, 0.25) + 1

    with torch.no_grad():
        found = torch.compile(step, fullgraph=True, dynamic=False)(x, q)
        for a, b in zip(found, step(x, q), strict=True):
            torch.testing.assert_close(a, b)


def test_what_kernels_do_not_serve_takes_torch_and_says_why():
    x, weights, biases = _linears(torch.float64, (9,), 8, [4])
    row_linear(x, weights, biases)
    assert linear_op.last_used == "naive"
    q, k, v = _attention(torch.float32, 1, 2, 1, 5, 7)
    row_attention(q, k, v, None, 1.0)
    assert attention_op.last_used == "naive"
    with pytest.raises(BackendError, match="fp32"):
        row_linear(x, weights, biases, backend="cpu")
    with pytest.raises(BackendError, match="no whole number"):
        row_attention(q, k, v, None, 1.0, backend="cpu")


def test_bad_shapes_are_refused():
    x, weights, _ = _linears(torch.float32, (1,), 8, [4])
    with pytest.raises(ConfigError, match="widths must agree"):
        row_linear(x[:, :7], weights, [None])
    q, k, v = _attention(torch.float32, 1, 3, 2, 5, 16)
    with pytest.raises(ConfigError, match="do not share"):
        row_attention(q, k, v, None, 1.0)
    with pytest.raises(BackendError, match="no backend"):
        row_linear(x, weights, [None], backend="cuda")
