"""`block_linear`: the tiles' kernels equal the masked dense layer in value and in each gradient, by name, on ragged
shapes and in poisoned memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import BackendError, ConfigError
from fallow.ops import block_linear as op
from fallow.ops.block_linear import Tiles, block_linear, cpu, naive, tiles_of

# relative Frobenius error against fp64: fp32 sums cancel; bf16 results are rounded once, by 2^-8 at most
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
DTYPES = [torch.float32, torch.bfloat16]
native = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
AMX = 3


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory a kernel forgot to write is NaN, never a lucky zero: torch's, and the C library's through freed blocks."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    poison()
    yield
    torch.use_deterministic_algorithms(before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[0]


def poison() -> None:
    blocks = [torch.full((n,), float("nan")) for n in (16, 256, 1024, 4096, 8192, 1 << 16, 1 << 18) for _ in range(4)]
    del blocks


def make(out, in_, block, density, dtype, *, lead=(37,), bias=True, seed=0):
    """Tiles with an empty row and an empty column where the grid has room for them, leaves by name, and dy."""
    g = torch.Generator().manual_seed(seed)
    R, C = -(-out // block), -(-in_ // block)
    mask_RC = torch.rand(R, C, generator=g) < density
    if density < 1 and R > 1 and C > 1:
        mask_RC[R // 2], mask_RC[:, C // 3] = False, False
    tiles = tiles_of(mask_RC, out, in_, block)
    leaves = {"x": torch.randn(*lead, in_, generator=g), "values": torch.randn(tiles.shape, generator=g)}
    if bias:
        leaves["bias"] = torch.randn(out, generator=g)
    leaves = {n: t.to(dtype).requires_grad_() for n, t in leaves.items()}
    return tiles, leaves, torch.randn(*lead, out, generator=g).to(dtype)


def run(tiles: Tiles, leaves, dy, backend):
    y = block_linear(leaves["x"], leaves["values"], tiles, leaves.get("bias"), backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{n}": t for n, t in zip(leaves, grads, strict=True)}


def assert_close(got, tiles, leaves, dy, dtype):
    want = run(tiles, {n: t.detach().double().requires_grad_() for n, t in leaves.items()}, dy.double(), "naive")
    assert got.keys() == want.keys()
    for name, truth in want.items():
        assert got[name].dtype == dtype and got[name].shape == truth.shape, name
        assert torch.isfinite(got[name]).all(), f"{name} has entries that were never written"
        error = (got[name].double() - truth).norm() / truth.norm().clamp_min(1e-30)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.1, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 80, 128])
def test_cpu_matches_naive(block, density, dtype):
    for out, in_, lead in ((261, 390, (37,)), (130, 70, (1,)), (64, 200, (3, 7))):
        tiles, leaves, dy = make(out, in_, block, density, dtype, lead=lead, bias=lead != (1,))
        got = run(tiles, leaves, dy, None)
        assert op.last_used == "cpu"
        assert_close(got, tiles, leaves, dy, dtype)


@native
@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 200),
    in_=st.integers(1, 200),
    block=st.sampled_from([16, 32, 64, 112]),
    density=st.sampled_from([0.1, 0.5, 1.0]),
    lead=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_cpu_matches_naive_on_any_shape(out, in_, block, density, lead, bias, dtype, seed):
    tiles, leaves, dy = make(out, in_, block, density, dtype, lead=tuple(lead), bias=bias, seed=seed)
    assert_close(run(tiles, leaves, dy, "cpu"), tiles, leaves, dy, dtype)


def at_level(level, tiles: Tiles, leaves, dy):
    """The kernels' results at an instruction set, as `run` gives them."""
    index = [tiles.rows_N, tiles.cols_N, tiles.row_start, tiles.col_start, tiles.col_order]
    x, values, bias = (leaves[n].detach() for n in ("x", "values", "bias"))
    size = [tiles.out, tiles.in_, tiles.block]
    y = cpu.forward(x, values, bias, index, size, level)
    dx, dvalues = cpu.backward(dy, x, values, index, size, True, True, level)
    assert dx is not None and dvalues is not None
    return {"y": y, "dx": dx, "dvalues": dvalues, "dbias": dy.sum(0)}


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set_gives_the_same(level, dtype):
    for block in (16, 48, 64):
        tiles, leaves, dy = make(150, 210, block, 0.5, dtype, lead=(53,), bias=True)
        assert_close(at_level(level, tiles, leaves, dy), tiles, leaves, dy, dtype)


@pytest.fixture
def amx():
    if cpu.native.library().fallow_isa() < AMX:
        pytest.skip("this CPU, operating system or compiler has no AMX for bf16")


@native
@pytest.mark.parametrize("block", [32, 64, 96, 128])
@pytest.mark.parametrize(
    ("out", "in_", "tokens"), [(150, 210, 53), (33, 31, 1), (64, 64, 32), (390, 261, 95), (130, 520, 1100)]
)
def test_amx_matches_naive(amx, out, in_, tokens, block):
    tiles, leaves, dy = make(out, in_, block, 0.5, torch.bfloat16, lead=(tokens,))
    assert_close(at_level(AMX, tiles, leaves, dy), tiles, leaves, dy, torch.bfloat16)


@native
def test_amx_sums_go_on_past_its_workspace(amx):
    """dy of 3,105 tokens of 4,096 channels is more than is cut up at once."""
    tiles, leaves, dy = make(4096, 70, 64, 0.3, torch.bfloat16, lead=(3105,))
    assert_close(at_level(AMX, tiles, leaves, dy), tiles, leaves, dy, torch.bfloat16)


@native
def test_amx_is_asked_for_by_level(amx):
    """AMX takes subnormals for zero and fp32 FMAs do not, so the two are told apart by one product."""
    tiles = tiles_of(torch.ones(1, 1, dtype=torch.bool), 32, 32, 32)
    leaves = {"x": torch.full((1, 32), 2.0**-130), "values": torch.full((1, 32, 32), 2.0**30), "bias": torch.zeros(32)}
    leaves = {n: t.bfloat16() for n, t in leaves.items()}
    dy = torch.zeros(1, 32, dtype=torch.bfloat16)
    assert at_level(2, tiles, leaves, dy)["y"].eq(2.0**-95).all()
    for level in (AMX, -1):
        assert at_level(level, tiles, leaves, dy)["y"].eq(0).all()


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_tokens_than_fit_the_workspace(dtype):
    """3,000 tokens of 2,500 channels are three chunks of panels: sums go on from chunk to chunk."""
    tiles, leaves, dy = make(150, 2500, 64, 0.2, dtype, lead=(3001,))
    assert_close(run(tiles, leaves, dy, "cpu"), tiles, leaves, dy, dtype)


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_as_inputs(dtype):
    tiles, leaves, _ = make(90, 70, 32, 0.6, dtype, lead=(21,))
    g = torch.Generator().manual_seed(3)
    leaves["x"] = torch.randn(70, 42, generator=g).to(dtype)[:, ::2].t().requires_grad_()
    leaves["values"] = torch.randn(*tiles.shape, generator=g).to(dtype).transpose(1, 2).requires_grad_()
    for dy in (torch.randn(90, 21, generator=g).to(dtype).t(), torch.ones((), dtype=dtype).expand(21, 90)):
        assert_close(run(tiles, leaves, dy, "cpu"), tiles, leaves, dy, dtype)


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_zero_whatever_it_holds(dtype):
    tiles, leaves, dy = make(70, 90, 64, 1.0, dtype)
    clean = run(tiles, leaves, dy, "cpu")
    mask_Nbb = torch.zeros(tiles.shape, dtype=torch.bool)
    for n, (r, c) in enumerate(zip(tiles.rows_N.tolist(), tiles.cols_N.tolist(), strict=True)):
        mask_Nbb[n, : 70 - 64 * r, : 90 - 64 * c] = True
    for filling in (float("nan"), float("inf")):
        leaves["values"] = torch.where(mask_Nbb, leaves["values"].detach(), filling).requires_grad_()
        dirty = run(tiles, leaves, dy, "cpu")
        for name, want in clean.items():
            assert torch.equal(dirty[name], want), name
    assert dirty["dvalues"][~mask_Nbb].eq(0).all() and dirty["dvalues"][mask_Nbb].ne(0).all()
    leaves["x"] = torch.full_like(leaves["x"], float("inf"))
    leaves["x"].requires_grad_()
    assert run(tiles, leaves, dy, "cpu")["dvalues"][~mask_Nbb].eq(0).all()


@native
def test_no_tiles_and_no_tokens():
    tiles = tiles_of(torch.zeros(3, 2, dtype=torch.bool), 40, 20, 16)
    x, bias = torch.randn(5, 20, requires_grad=True), torch.randn(40, requires_grad=True)
    values = torch.randn(tiles.shape, requires_grad=True)
    got = run(tiles, {"x": x, "values": values, "bias": bias}, torch.ones(5, 40), "cpu")
    assert torch.equal(got["y"], bias.detach().expand(5, 40)) and got["dx"].eq(0).all()
    assert got["dvalues"].shape == (0, 16, 16) and got["dbias"].eq(5).all()
    tiles, leaves, dy = make(40, 20, 16, 1.0, torch.bfloat16, lead=(0,))
    got = run(tiles, leaves, dy, "cpu")
    assert got["y"].shape == (0, 40) and got["dvalues"].eq(0).all() and got["dbias"].eq(0).all()


@native
@pytest.mark.parametrize("frozen", ["x", "values", "bias"])
def test_only_the_gradients_asked_for(frozen):
    tiles, leaves, dy = make(70, 90, 32, 0.5, torch.float32)
    want = run(tiles, leaves, dy, "naive")
    thawed = {n: t for n, t in leaves.items() if n != frozen}
    y = block_linear(
        *(leaves[n].detach() if n == frozen else leaves[n] for n in ("x", "values")), tiles, leaves["bias"]
    )
    if frozen == "bias":
        y = block_linear(leaves["x"], leaves["values"], tiles, leaves["bias"].detach())
    grads = torch.autograd.grad(y, list(thawed.values()), dy)
    for name, grad in zip(thawed, grads, strict=True):
        torch.testing.assert_close(
            grad, want[f"d{name}"], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@native
@pytest.mark.parametrize("tokens", [40, 200])
def test_one_thread_gives_the_same_bits(tokens):
    tiles, leaves, dy = make(1040, 390, 32, 0.5, torch.bfloat16, lead=(tokens,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(tiles, leaves, dy, "cpu")
        torch.set_num_threads(5)
        many = run(tiles, leaves, dy, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[n], many[n]) for n in one)


@native
def test_autocast_casts_input_and_values():
    tiles, leaves, dy = make(70, 90, 32, 0.5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = block_linear(leaves["x"], leaves["values"], tiles, leaves["bias"])
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert leaves["x"].grad.dtype == leaves["values"].grad.dtype == torch.float32


@native
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    tiles, leaves, dy = make(70, 90, 32, 0.5, torch.float32, lead=(6,), bias=bias)
    index = [tiles.rows_N, tiles.cols_N, tiles.row_start, tiles.col_start, tiles.col_order]
    size = [tiles.out, tiles.in_, tiles.block]
    torch.library.opcheck(op.op.forward, (leaves["x"], leaves["values"], leaves.get("bias"), index, size, "cpu"))
    x, values = leaves["x"].detach(), leaves["values"].detach()
    torch.library.opcheck(op.op.backward, (dy, x, values, index, size, "cpu", True, True))
    torch.library.opcheck(op.op.backward, (dy, x, values, index, size, "cpu", False, True))


@native
def test_compile_keeps_the_op():
    tiles, leaves, _ = make(70, 90, 32, 0.5, torch.float32, lead=(2, 5))
    compiled = torch.compile(lambda x, v, b: block_linear(x, v, tiles, b).tanh(), backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(
        block_linear(leaves["x"], leaves["values"], tiles, leaves["bias"]).tanh().sum(), leaves.values()
    )
    got = torch.autograd.grad(compiled(*leaves.values()).sum(), leaves.values())
    for name, a, b in zip(leaves, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"d{name}: {m}")


def test_naive_gradients_are_the_numerical_ones():
    tiles, leaves, _ = make(21, 35, 16, 0.6, torch.float64, lead=(3,))
    assert torch.autograd.gradcheck(
        lambda x, v, b: block_linear(x, v, tiles, b, backend="naive"), tuple(leaves.values()), fast_mode=True
    )


def test_naive_is_the_dense_layer():
    tiles = tiles_of(torch.tensor([[True, False], [False, True]]), 20, 30, 16)
    values = torch.randn(2, 16, 16)
    weight = naive.dense(values, tiles)
    assert torch.equal(weight[:16, :16], values[0]) and torch.equal(weight[16:, 16:], values[1, :4, :14])
    assert weight[:16, 16:].eq(0).all() and weight[16:, :16].eq(0).all()


def test_tiles_index_rows_and_columns():
    mask = torch.tensor([[False, True, True], [False, False, False], [True, True, False]])
    tiles = tiles_of(mask, 40, 48, 16)
    assert tiles.rows_N.tolist() == [0, 0, 2, 2] and tiles.cols_N.tolist() == [1, 2, 0, 1]
    assert tiles.row_start.tolist() == [0, 2, 2, 4] and tiles.col_start.tolist() == [0, 1, 3, 4]
    assert tiles.col_order.tolist() == [2, 0, 3, 1]
    assert tiles.grid == (3, 3) and tiles.shape == (4, 16, 16)


@pytest.mark.parametrize(
    ("mask", "out", "in_", "block"),
    [
        (torch.ones(2, 2, dtype=torch.bool), 40, 32, 16),
        (torch.ones(2, 2), 32, 32, 16),
        (torch.ones(2, 2, dtype=torch.bool), 48, 48, 24),
        (torch.ones(0, 2, dtype=torch.bool), 0, 32, 16),
    ],
)
def test_wrong_masks_are_refused(mask, out, in_, block):
    with pytest.raises(ConfigError, match="block_linear"):
        tiles_of(mask, out, in_, block)


def test_wrong_sizes_and_backends_are_refused():
    tiles, leaves, _ = make(70, 90, 32, 0.5, torch.float32)
    x, values, bias = (t.detach() for t in leaves.values())
    for wrong in ((x[:, :-1], values, tiles, bias), (x, values[1:], tiles, bias), (x, values, tiles, bias[1:])):
        with pytest.raises(ConfigError, match="block_linear"):
            block_linear(*wrong)
    with pytest.raises(BackendError, match="no backend"):
        block_linear(x, values, tiles, bias, backend="cuda")
    with pytest.raises(BackendError, match="cannot run"):
        block_linear(x.double(), values, tiles, bias, backend="cpu")


def test_what_the_kernels_do_not_serve_takes_naive():
    tiles, leaves, dy = make(70, 90, 32, 0.5, torch.float16)
    run(tiles, leaves, dy, None)
    assert op.last_used == "naive"
