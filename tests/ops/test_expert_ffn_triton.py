"""The Triton kernels of `expert_ffn` against the naive truth in fp64: value and each gradient, buffers poisoned.

Triton fixes "interpreter or compiler" when it is first imported, so without a CUDA device this file runs itself once
more in a child process with TRITON_INTERPRET=1. The interpreter's dot knows no bfloat16; a CUDA device is tested in it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tests.interpreter import INTERPRETED, passes_interpreted
from tests.ops.test_expert_ffn import call, choose, double, gradient_like, make, run

from fallow.errors import BackendError
from fallow.ops import expert_ffn as op
from fallow.ops.activation import ACTIVATIONS
from fallow.ops.expert_ffn import cpu, triton
from fallow.ops.expert_ffn.order import empty_order

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
    """Every buffer a kernel is to fill starts as NaN, those of the op through torch's own switch."""
    real = triton._empty
    monkeypatch.setattr(triton, "_empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[0]


def assert_equals_naive(leaves, choice, *, act="relu", experts=4):
    leaves = {n: t.detach().to(DEVICE).requires_grad_(t.requires_grad) for n, t in leaves.items()}
    choice, dtype = choice.to(DEVICE), leaves["x"].dtype
    dy = gradient_like(leaves["x"].cpu()).to(DEVICE)
    got = run(leaves, choice, dy, act=act, experts=experts, backend="triton")
    want = run(double(leaves), choice, dy.double(), act=act, experts=experts, backend="naive")
    for name, truth in want.items():
        assert got[name].shape == truth.shape and torch.isfinite(got[name]).all(), name
        error = float((got[name].double() - truth).norm() / truth.norm().clamp_min(1e-30))
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.2e}"
    return got


@needs_kernels
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_value_and_gradients(act, gated):
    assert_equals_naive(*make(C=21, D=37, gated=gated), act=act)


@needs_kernels
@pytest.mark.parametrize(
    ("T", "D", "C", "E", "K"), [(1, 16, 16, 4, 1), (5, 20, 3, 3, 3), (40, 70, 33, 2, 1), (23, 16, 48, 8, 5)], ids=str
)
def test_ragged_sizes(T, D, C, E, K):
    assert_equals_naive(*make(T, D, C, E, K, unused=K < E), experts=E)
    assert_equals_naive(*make(T, D, C, E, K, gated=False, bias=False, coefficient=False), experts=E)


@needs_kernels
def test_no_tokens():
    leaves, choice = make(T=0)
    leaves = {n: t.detach().to(DEVICE).requires_grad_() for n, t in leaves.items()}
    got = run(leaves, choice.to(DEVICE), leaves["x"].detach(), backend="triton")
    assert got["y"].shape == (0, 24) and not any(g.any() for n, g in got.items() if n.startswith("d w"))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16] + ([] if INTERPRETED else [torch.bfloat16]), ids=str)
def test_half_precision(dtype):
    assert_equals_naive(*make(dtype=dtype), act="silu")


@needs_kernels
def test_transposed_weights():
    leaves, choice = make(bias=False)
    turned = {n: t.detach().t().contiguous().t().requires_grad_() for n, t in leaves.items() if n.startswith("w_")}
    assert_equals_naive(leaves | turned, choice)


@needs_kernels
def test_registered_for_compile():
    leaves, choice = make(T=9)
    leaves, choice = {n: t.detach().to(DEVICE).requires_grad_() for n, t in leaves.items()}, choice.to(DEVICE)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    got, want = compiled(leaves, choice, backend="triton"), call(leaves, choice, backend="triton")
    assert torch.equal(got, want)


@pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
@pytest.mark.parametrize(("T", "E", "K", "pad"), [(37, 5, 2, 16), (64, 4, 4, 8), (3, 8, 1, 32), (0, 4, 2, 16)])
def test_order_is_that_of_the_cpu(T, E, K, pad):
    choice = choose(T, E, K, torch.Generator().manual_seed(1), unused=True)
    got, want = empty_order(choice, E, pad), empty_order(choice, E, pad)
    triton.sort(choice, pad, got)
    cpu.sort(choice, pad, want)
    for name in ("start_E1", "count_E", "slot_TK"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    used = got.slot_TK.view(-1)
    assert torch.equal(got.token_R[used], want.token_R[used])
    assert torch.equal(got.token_R[got.slot_TK], torch.arange(T)[:, None].expand(T, K))


@needs_triton
def test_chosen_for_cuda_tensors_only():
    """The interpreter computes on the CPU, but only when asked."""
    leaves, choice = make()
    call(leaves, choice)
    assert op.last_used != "triton"
    if not INTERPRETED:
        with pytest.raises(BackendError, match=r"cpu|no CUDA device"):
            call(leaves, choice, backend="triton")


def compile_for_hopper(kernel: Any, constants: dict[str, Any], **options: int) -> Any:
    """The kernel compiled for sm_90 on bf16 pointers and 16-byte-aligned operands; needs no GPU."""
    import triton as language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = kernel.fn  # below the autotuner
    free = [n for n in fn.arg_names if n not in constants]
    types = dict.fromkeys(("token", "start", "count"), "*i64") | {"expert_of": "*i32", "dot": "*fp32"}
    numbers = [n for n in free if n in ("D", "C", "n_rows") or n.endswith(("_f", "_d"))]
    signature = {
        n: "constexpr" if n not in free else "i32" if n in numbers else types.get(n, "*bf16") for n in fn.arg_names
    }
    aligned = {(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in free}
    source = ASTSource(fn, signature, constexprs=constants, attrs=aligned)
    return language.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_for_hopper():
    """The compiler accepts less than the interpreter, and every GEMM is to reach the tensor cores."""
    from fallow.ops.expert_ffn import triton_kernels as kernels

    gemm = {"GATED": True, "PRECISION": "ieee", "BM": 64, "BN": 64, "BK": 64}
    rows, cols = {"gate_d": 1, "up_d": 1}, {"down_f": 1}
    cases = [
        (kernels.inner_kernel, gemm | rows | {"b_gate": None, "b_up": None}),
        (kernels.down_kernel, gemm | cols | {"ACT": "relu"}),
        (kernels.hidden_grad_kernel, gemm | cols | {"ACT": "relu"}),
        (kernels.input_grad_kernel, gemm | rows),
        (kernels.weight_grad_kernel, {"PRECISION": "ieee", "BI": 64, "BJ": 128, "BR": 64, "out_d": 1}),
    ]
    for kernel, constants in cases:
        compiled = compile_for_hopper(kernel, constants, num_warps=4, num_stages=3)
        assert "wgmma.mma_async" in compiled.asm["ptx"], kernel.fn.__name__
        assert compiled.metadata.shared <= 227 * 1024
