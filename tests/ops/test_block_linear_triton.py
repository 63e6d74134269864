"""The Triton kernels of `block_linear` against the naive truth in fp64: value and each gradient, buffers poisoned.

Triton fixes "interpreter or compiler" when it is first imported, so without a CUDA device this file runs itself once
more in a child process with TRITON_INTERPRET=1. The interpreter's dot knows no bfloat16; a CUDA device is tested in it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tests.interpreter import INTERPRETED, passes_interpreted

from fallow.errors import BackendError
from fallow.ops import block_linear as op
from fallow.ops.block_linear import naive, tiles_of, triton

RUNS = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the norm; fp32 under "highest"
# tokens, out, in, block: one token, exact, ragged on both sides, sides that are no power of two or exceed a program's
SHAPES = [(1, 16, 16, 16), (19, 37, 61, 16), (33, 64, 96, 32), (5, 100, 90, 48), (18, 70, 150, 64), (17, 150, 160, 144)]

needs_kernels = pytest.mark.skipif(not RUNS, reason="runs in the child process of test_through_the_interpreter")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install 'fallow[gpu]')"
)


@pytest.mark.skipif(RUNS, reason="this process runs the kernels already")
@needs_triton
def test_through_the_interpreter():
    passes_interpreted(__file__)


def compile_for_hopper(kernel: Any, constants: dict[str, Any], **options: int) -> Any:
    """The kernel compiled for sm_90 on bf16 pointers and 16-byte-aligned operands; needs no GPU."""
    import triton as language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = kernel.fn  # below the autotuner
    free = [n for n in fn.arg_names if n not in constants]
    integers = ("start", "order", "other", "rows", "cols")
    types = {n: "i32" if n.startswith("n_") else "*i32" if n in integers else "*bf16" for n in free}
    signature = {n: types.get(n, "constexpr") for n in fn.arg_names}
    aligned = {(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in free if n not in ("n_lines", "n_parts")}
    source = ASTSource(fn, signature, constexprs=constants, attrs=aligned)
    return language.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_for_hopper():
    """The compiler accepts less than the interpreter. Tiles reach the tensor cores by asynchronous copies of 16 bytes,
    although the columns of x are read through an index, small tiles too."""
    from fallow.ops.block_linear import triton_kernels as kernels

    for block in (16, 48, 64, 256):
        shared = {"B": block, "BN": kernels._parts(block)[0], "PRECISION": "ieee"}
        gemm = shared | {"BM": 128, "BK": 64}
        for constants in (
            gemm | {"W_OUT": block, "W_IN": 1, "order": None},
            gemm | {"W_OUT": 1, "W_IN": block, "bias": None},
        ):
            compiled = compile_for_hopper(kernels.lines_kernel, constants, num_warps=4, num_stages=3)
            assert "wgmma.mma_async" in compiled.asm["ptx"]
            assert "cp.async.cg.shared.global" in compiled.asm["ptx"]
            assert compiled.metadata.shared <= 227 * 1024
        compiled = compile_for_hopper(kernels.tile_gradients_kernel, shared | {"BR": 64}, num_warps=4, num_stages=3)
        assert ("wgmma.mma_async" if block > 32 else "mma.sync") in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 227 * 1024


@needs_triton
def test_chosen_for_cuda_tensors_only():
    """The interpreter computes on the CPU, but only when asked."""
    tiles = tiles_of(torch.ones(1, 1, dtype=torch.bool), 16, 16, 16)
    x, values = torch.ones(2, 16), torch.ones(1, 16, 16)
    op.block_linear(x, values, tiles)
    assert op.last_used != "triton"
    if INTERPRETED:
        op.block_linear(x, values, tiles, backend="triton")
        assert op.last_used == "triton"
        with pytest.raises(BackendError, match="float64"):
            op.block_linear(x.double(), values, tiles, backend="triton")
    else:
        with pytest.raises(BackendError, match=r"cpu|no CUDA device"):
            op.block_linear(x, values, tiles, backend="triton")


@pytest.fixture
def poisoned(monkeypatch):
    """Every buffer a kernel is to fill starts as NaN; counts them."""
    made = []

    def nan(like, *shape):
        made.append(shape)
        return like.new_full(shape, float("nan"))

    monkeypatch.setattr(triton, "_empty", nan)
    return made


def case(T, n_out, n_in, block, *, density=0.5, holes=True, dtype=torch.float32, bias=True, seed=0):
    """(named leaves, tiles); with `holes`, the first row and the last column of tiles are empty where there are two."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(-(-n_out // block), -(-n_in // block), generator=g) < density
    mask[-1, 0] = True
    if holes and mask.shape[0] > 1:
        mask[0] = False
    if holes and mask.shape[1] > 1:
        mask[:, -1] = False
    tiles = tiles_of(mask.to(DEVICE), n_out, n_in, block)

    def leaf(*shape):
        return torch.randn(*shape, generator=g).to(dtype).to(DEVICE).requires_grad_()

    named = {"x": leaf(T, n_in), "values": leaf(*tiles.shape)} | ({"bias": leaf(n_out)} if bias else {})
    return named, tiles


def run(backend, named, tiles, dy) -> dict[str, torch.Tensor]:
    """{"y": …, "d x": …, …}: value and the gradient of each argument that wants one."""
    leaves = {k: v.detach().to(dy.dtype).requires_grad_(v.requires_grad) for k, v in named.items()}
    y = op.block_linear(leaves["x"], leaves["values"], tiles, leaves.get("bias"), backend=backend)
    y.backward(dy)
    return {"y": y.detach()} | {f"d {k}": v.grad for k, v in leaves.items() if v.grad is not None}


def assert_equal_to_naive(named, tiles):
    x = named["x"]
    g = torch.Generator().manual_seed(2)
    dy = torch.randn(*x.shape[:-1], tiles.out, generator=g).to(x.dtype).to(DEVICE)
    got, want = run("triton", named, tiles, dy), run("naive", named, tiles, dy.double())
    assert got.keys() == want.keys()
    for name, ref in want.items():
        assert got[name].shape == ref.shape, name
        error = float((got[name].double() - ref).norm() / ref.norm().clamp_min(1e-30))
        assert error < TOLERANCE[x.dtype], f"{name}: relative error {error:.2e}"
    return got


@needs_kernels
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(poisoned, shape, density):
    named, tiles = case(*shape, density=density, holes=density < 1)
    assert_equal_to_naive(named, tiles)
    T, n_out, n_in, _ = shape
    assert poisoned == [(T, n_out), (T, n_in), tiles.shape]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16] + ([] if INTERPRETED else [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_half_precision(poisoned, shape, dtype):
    named, tiles = case(*shape, dtype=dtype)
    assert_equal_to_naive(named, tiles)


@needs_kernels
def test_empty_rows_give_the_bias_and_empty_columns_no_gradient(poisoned):
    named, tiles = case(7, 40, 40, 16)
    got = assert_equal_to_naive(named, tiles)
    assert torch.equal(got["y"][:, :16], named["bias"].detach()[:16].expand(7, 16))
    assert not got["d x"][:, 32:].any()


@needs_kernels
@pytest.mark.parametrize("block", [16, 48])
def test_a_line_writes_its_own_columns_only(block):
    """The interpreter runs programs one after the other, so a later line would hide what an earlier one spilt."""
    from fallow.ops.block_linear.triton_kernels import lines

    named, tiles = case(5, 2 * block, 2 * block, block, density=1.0, holes=False)
    x, values = named["x"].detach(), named["values"].detach()
    y = torch.full((5, 2 * block), float("nan"), device=DEVICE)
    lines(x, values, None, tiles.row_start[:2], None, tiles.cols_N, y, transposed=False)
    want = x @ naive.dense(values, tiles)[:block].t()
    torch.testing.assert_close(y[:, :block], want, rtol=1e-5, atol=1e-4)
    assert y[:, block:].isnan().all()


@needs_kernels
def test_no_tiles_at_all(poisoned):
    tiles = tiles_of(torch.zeros(2, 3, dtype=torch.bool, device=DEVICE), 32, 48, 16)
    named = {"x": torch.randn(4, 48, device=DEVICE).requires_grad_(), "values": torch.zeros(0, 16, 16, device=DEVICE)}
    got = run("triton", named, tiles, torch.ones(4, 32, device=DEVICE))
    assert not got["y"].any() and not got["d x"].any()


@needs_kernels
def test_what_tiles_hold_beyond_the_weight_counts_as_zero(poisoned):
    named, tiles = case(6, 21, 27, 16, density=1.0, holes=False)
    (R, C), b = tiles.grid, 16
    values = named["values"].detach().view(R, C, b, b).clone()
    values[-1, :, 21 - b :] = float("nan")
    values[:, -1, :, 27 - b :] = float("nan")
    dirty = named | {"values": values.view(-1, b, b).requires_grad_()}
    dy = torch.randn(6, 21, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    got, want = run("triton", dirty, tiles, dy), run("triton", named, tiles, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)
    gradient = got["d values"].view(R, C, b, b)
    assert not gradient[-1, :, 21 - b :].any() and not gradient[:, -1, :, 27 - b :].any()


@needs_kernels
def test_leading_dimensions_strides_and_no_bias(poisoned):
    named, tiles = case(6, 37, 20, 16, bias=False, holes=False)
    base = torch.randn(20, 3, 2, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    named["x"] = base.permute(2, 1, 0).requires_grad_()  # [2, 3, in], not contiguous
    assert assert_equal_to_naive(named, tiles)["y"].shape == (2, 3, 37)
    named["x"] = torch.zeros(0, 20, device=DEVICE).requires_grad_()
    got = run("triton", named, tiles, torch.zeros(0, 37, device=DEVICE))
    assert got["y"].shape == (0, 37) and not got["d values"].any()


@needs_kernels
def test_frozen_arguments_get_no_gradient_and_no_buffer(poisoned):
    named, tiles = case(5, 32, 48, 16, bias=False)
    named["values"].requires_grad_(False)
    assert assert_equal_to_naive(named, tiles).keys() == {"y", "d x"}
    assert poisoned == [(5, 32), (5, 48)]
    poisoned.clear()
    named["values"].requires_grad_(True)
    named["x"].requires_grad_(False)
    assert assert_equal_to_naive(named, tiles).keys() == {"y", "d values"}
    assert poisoned == [(5, 32), tiles.shape]


@needs_kernels
def test_backward_saves_x_and_values_only():
    saved = []
    named, tiles = case(6, 32, 48, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op.block_linear(named["x"], named["values"], tiles, named["bias"], backend="triton")
    kept = {t.data_ptr() for t in saved if t.is_floating_point()}
    assert kept == {named["x"].data_ptr(), named["values"].data_ptr()}


@needs_kernels
def test_registered_for_compile():
    named, tiles = case(6, 37, 29, 16)
    index = [tiles.rows_N, tiles.cols_N, tiles.row_start, tiles.col_start, tiles.col_order]
    arguments = (named["x"], named["values"], named["bias"], index, [tiles.out, tiles.in_, tiles.block], "triton")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.op.forward, arguments, test_utils=checks)

    def layer(x, values, bias):
        return op.op.run(x * 2, values, tiles, bias, "triton").sin()

    leaves = list(named.values())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    eager, graph = layer(*leaves), compiled(*leaves)
    torch.testing.assert_close(graph, eager, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad(graph.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_naive_serves_what_the_kernels_do_not():
    assert naive.available()[0]
    ok, reason = triton.usable(torch.ones(1, 16, dtype=torch.float64), tiles_of(torch.ones(1, 1) > 0, 16, 16, 16))
    assert not ok and ("float64" if INTERPRETED else "cpu") in reason
