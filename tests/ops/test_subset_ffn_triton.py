"""The Triton kernels of `subset_ffn` against the naive truth: value and each gradient, by name, buffers poisoned.

Triton fixes "interpreter or compiler" when it is first imported, so without a CUDA device this file runs itself once
more in a child process with TRITON_INTERPRET=1. The interpreter's dot knows no bfloat16: there, bf16 covers the gather
variant only (its GEMMs are torch.mm); on a CUDA device it covers both.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tests.interpreter import INTERPRETED, passes_interpreted

from fallow.errors import BackendError
from fallow.ops.subset_ffn import naive, triton

RUNS = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
WEIGHTS = ("w_up_FD", "w_down_DF", "w_gate_FD")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the norm; fp32 under "highest"

needs_kernels = pytest.mark.skipif(not RUNS, reason="runs in the child process of test_through_the_interpreter")


@pytest.mark.skipif(RUNS, reason="this process runs the kernels already")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install 'fallow[gpu]')")
def test_through_the_interpreter():
    passes_interpreted(__file__)


def test_says_why_it_cannot_run():
    x = torch.ones(2, 4, dtype=torch.float64)
    ok, reason = triton.usable(x)
    assert not ok
    assert ("float64" in reason) if INTERPRETED else ("cpu" in reason)
    with pytest.raises(BackendError, match="backend"):
        triton.subset_ffn(x, torch.ones(3, 4), torch.ones(4, 3), None)
    ok, reason = triton.available()
    assert reason and (ok or not RUNS)


def compile_for_hopper(kernel: Any, constants: dict[str, Any], **options: int) -> Any:
    """The kernel compiled for sm_90 on bf16 pointers and 16-byte-aligned operands; needs no GPU."""
    import triton as language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = kernel if isinstance(kernel, language.runtime.jit.JITFunction) else kernel.fn
    free = [n for n in fn.arg_names if n not in constants]
    # strides and sizes are named like n_rows, in_t or T; the index tensors idx and at; all else is a tensor
    scalar = {n for n in free if n.startswith("n_") or n.isupper() or re.search("_[rctfdk]$", n)}
    types = {n: "i32" if n in scalar else "*i64" if n in ("idx", "at") else "*bf16" for n in free}
    signature = {n: types.get(n, "constexpr") for n in fn.arg_names}
    aligned = {(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in free}
    source = ASTSource(fn, signature, constexprs=constants, attrs=aligned)
    return language.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install 'fallow[gpu]')")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_for_hopper():
    """The compiler accepts less than the interpreter. Copies move 16 bytes a thread, GEMMs use the tensor cores."""
    from fallow.ops.subset_ffn import triton_gemms as gemms
    from fallow.ops.subset_ffn import triton_kernels as kernels

    plain = {"b_gate": None, "b_up": None, "ACT": "silu"}
    tile = {"ROWS": 16, "COLS": 256, "src_c": 1, "out_c": 1}
    block = {"TOKENS": 8, "CHANNELS": 256}
    for kernel, constants in (
        (kernels.take_kernel, tile | {"DIM": 0}),
        (kernels.put_kernel, tile | {"DIM": 0}),
        (kernels.act_kernel, block | plain | {"idx": None, "at": None, "pre": None}),
        (kernels.act_kernel, block | {"idx": None, "gate": None, "ACT": "gelu"}),
        (kernels.act_backward_kernel, block | plain | {"idx": None, "GATED": True}),
    ):
        assert "ld.global.v4" in compile_for_hopper(kernel, constants).asm["ptx"]
    for kernel in (kernels.take_kernel, kernels.put_kernel):
        assert "st.global.v4" in compile_for_hopper(kernel, tile | {"DIM": 1}).asm["ptx"]
    gemm = {"BM": 128, "BN": 64, "BR": 64, "PRECISION": "ieee"}
    for kernel, constants in (
        (gemms.gate_up_kernel, plain | {"at": None, "w_d": 1}),
        (gemms.gate_up_kernel, plain | {"idx": None, "w_gate": None, "w_d": 1}),
        (gemms.grad_hidden_kernel, plain | {"w_k": 1, "GATED": True}),
        (gemms.grad_input_kernel, {"w_d": 1}),
        (gemms.grad_outer_kernel, {"out_d": 1}),
    ):
        compiled = compile_for_hopper(kernel, gemm | constants, num_warps=4, num_stages=4)
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 227 * 1024


@pytest.fixture
def poisoned(monkeypatch):
    """Every buffer a kernel is to fill starts as NaN; counts them."""
    from fallow.ops.subset_ffn import triton_steps as steps

    made = []

    def nan(shape, like):
        made.append(shape)
        return like.new_full(shape, float("nan"))

    monkeypatch.setattr(steps, "_empty", nan)
    return made


def inputs(T, D, F, *, gated=True, biases=True, dtype=torch.float32, conv1d=False, seed=0) -> dict[str, torch.Tensor]:
    """Arguments by name, as leaves. `conv1d`: weights are transposed views, as GPT-2's are."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(DEVICE).requires_grad_()

    def weight(rows, cols):
        w = leaf(cols, rows, scale=cols**-0.5) if conv1d else leaf(rows, cols, scale=cols**-0.5)
        return w.detach().t().requires_grad_() if conv1d else w

    named = {"x_TD": leaf(T, D), "w_up_FD": weight(F, D), "w_down_DF": weight(D, F)}
    if gated:
        named["w_gate_FD"] = weight(F, D)
    if biases:
        named |= {"b_up_F": leaf(F), "b_down_D": leaf(D)} | ({"b_gate_F": leaf(F)} if gated else {})
    return named


def chosen(F, K, seed=1) -> torch.Tensor:
    return torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:K].sort().values.to(DEVICE)


def run(op, named, idx, dy, **options) -> dict[str, torch.Tensor]:
    """{"y": …, "d x_TD": …, …}: value and the gradient of each argument that wants one."""
    leaves = {k: v.detach().to(dy.dtype).requires_grad_(v.requires_grad) for k, v in named.items()}
    y = op(leaves["x_TD"], leaves["w_up_FD"], leaves["w_down_DF"], idx, **options, **{
        k: v for k, v in leaves.items() if k not in ("x_TD", "w_up_FD", "w_down_DF")
    })  # fmt: skip
    y.backward(dy)
    return {"y": y.detach()} | {f"d {k}": v.grad for k, v in leaves.items() if v.grad is not None}


def assert_equal_to_naive(named, idx, *, variant, **options):
    x, w_down = named["x_TD"], named["w_down_DF"]
    dy = torch.randn(x.shape[0], w_down.shape[0], generator=torch.Generator().manual_seed(2)).to(x.dtype).to(DEVICE)
    got = run(triton.subset_ffn, named, idx, dy, variant=variant, **options)
    want = run(naive.subset_ffn, named, idx, dy.double(), **options)
    assert got.keys() == want.keys()
    for name, ref in want.items():
        assert got[name].shape == ref.shape, name
        error = float((got[name].double() - ref).norm() / ref.norm())
        assert error < TOLERANCE[x.dtype], f"{name}: relative error {error:.2e}"
    if idx is not None:
        omitted = torch.ones(named["w_up_FD"].shape[0], dtype=torch.bool, device=idx.device).index_fill_(0, idx, False)
        for name in ("w_up_FD", "w_gate_FD", "b_up_F", "b_gate_F"):
            if f"d {name}" in got:
                assert not got[f"d {name}"][omitted].any(), f"d {name}: omitted rows are not exactly zero"
        assert not got["d w_down_DF"][:, omitted].any(), "d w_down_DF: omitted columns are not exactly zero"
    return got


@needs_kernels
@pytest.mark.parametrize("variant", triton.VARIANTS)
@pytest.mark.parametrize("omit_in", ["forward+backward", "backward", "weight_grad"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_value_and_gradients(poisoned, act, gated, omit_in, variant):
    named = inputs(19, 21, 37, gated=gated)
    idx = chosen(37, 18).flip(0) if act == "relu" else chosen(37, 18)  # the order of the index is free
    assert_equal_to_naive(named, idx, act=act, omit_in=omit_in, variant=variant)
    assert len(poisoned) >= 3


@needs_kernels
@pytest.mark.parametrize("variant", triton.VARIANTS)
@pytest.mark.parametrize(
    "T, D, F, K", [(1, 16, 16, 8), (16, 32, 48, 16), (33, 7, 300, 271), (5, 260, 9, 1), (40, 8, 12, 12)]
)
def test_shapes(poisoned, T, D, F, K, variant):
    assert_equal_to_naive(inputs(T, D, F), chosen(F, K), act="silu", omit_in="forward+backward", variant=variant)
    assert_equal_to_naive(inputs(T, D, F), chosen(F, K), act="silu", omit_in="backward", variant=variant)


@needs_kernels
@pytest.mark.parametrize("variant", triton.VARIANTS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_all_channels(poisoned, gated, variant):
    named = inputs(18, 20, 35, gated=gated, biases=False)
    for omit_in in ("forward+backward", "backward", "weight_grad"):
        assert_equal_to_naive(named, None, act="silu", omit_in=omit_in, variant=variant)


@needs_kernels
@pytest.mark.parametrize("variant", triton.VARIANTS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_transposed_weights_keep_their_memory_order(poisoned, gated, variant):
    named = inputs(18, 20, 35, gated=gated, conv1d=True)
    assert named["w_up_FD"].stride() == (1, 35)
    got = assert_equal_to_naive(named, chosen(35, 17), act="gelu_tanh", omit_in="forward+backward", variant=variant)
    assert got["d w_up_FD"].stride() == (1, 35)


@needs_kernels
@pytest.mark.parametrize("omit_in", ["forward+backward", "backward", "weight_grad"])
@pytest.mark.parametrize(
    "dtype, variant",
    [(torch.float16, "gather"), (torch.float16, "fused"), (torch.bfloat16, "gather")]
    + ([] if INTERPRETED else [(torch.bfloat16, "fused")]),
    ids=str,
)
def test_half_precision(poisoned, dtype, variant, omit_in):
    named = inputs(19, 21, 37, dtype=dtype)
    assert_equal_to_naive(named, chosen(37, 18), act="silu", omit_in=omit_in, variant=variant)


@needs_kernels
@pytest.mark.parametrize("variant", triton.VARIANTS)
def test_frozen_arguments_get_no_gradient_and_no_work(poisoned, monkeypatch, variant):
    from fallow.ops.subset_ffn import triton_steps as steps

    named = inputs(9, 12, 20, biases=False)
    for w in WEIGHTS:
        named[w].requires_grad_(False)

    def fail(*_args, **_kwargs):
        raise AssertionError("a weight gradient was computed for a frozen weight")

    monkeypatch.setattr(steps, "_weight_grad_fused", fail)
    monkeypatch.setattr(steps, "_weight_grad_gathered", fail)
    dy = torch.ones(9, 12, device=DEVICE)
    got = run(triton.subset_ffn, named, chosen(20, 10), dy, variant=variant)
    assert got.keys() == {"y", "d x_TD"}
    want = run(naive.subset_ffn, named, chosen(20, 10), dy)
    torch.testing.assert_close(got["d x_TD"], want["d x_TD"], rtol=1e-5, atol=1e-6)


@needs_kernels
def test_backward_saves_kept_activations_only():
    saved = []
    named = inputs(16, 8, 64, biases=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        triton.subset_ffn(named["x_TD"], named["w_up_FD"], named["w_down_DF"], chosen(64, 16),
                          w_gate_FD=named["w_gate_FD"], omit_in="backward")  # fmt: skip
    weights = {named[w].data_ptr() for w in WEIGHTS} | {named["x_TD"].data_ptr()}
    activations = [t for t in saved if t.is_floating_point() and t.data_ptr() not in weights]
    assert [tuple(t.shape) for t in activations] == [(16, 2 * 16)]


@needs_kernels
@pytest.mark.parametrize("variant", triton.VARIANTS)
def test_registered_for_compile(variant):
    named = inputs(6, 10, 14)
    idx = chosen(14, 7)
    args = [named[k] for k in ("x_TD", "w_up_FD", "w_down_DF")] + [idx]
    args += [named[k] for k in ("w_gate_FD", "b_gate_F", "b_up_F", "b_down_D")] + [
        "silu",
        "forward+backward",
        variant == "fused",
    ]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(triton._forward, tuple(args), test_utils=checks)

    def ffn(x, up, down, gate):
        return triton.subset_ffn(x * 2, up, down, idx, w_gate_FD=gate, variant=variant).sin()

    weights = [named[k] for k in ("x_TD", "w_up_FD", "w_down_DF", "w_gate_FD")]
    compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True)
    eager, graph = ffn(*weights), compiled(*weights)
    torch.testing.assert_close(graph, eager, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad(graph.sum(), weights), torch.autograd.grad(eager.sum(), weights), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@needs_kernels
def test_autocast_computes_in_its_dtype():
    named = inputs(8, 12, 20, biases=False)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = triton.subset_ffn(named["x_TD"], named["w_up_FD"], named["w_down_DF"], chosen(20, 10))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert named["w_up_FD"].grad.dtype == torch.float32
    want = naive.subset_ffn(named["x_TD"], named["w_up_FD"], named["w_down_DF"], chosen(20, 10))
    assert float(((y - want).norm() / want.norm()).detach()) < 1.6e-2


@needs_kernels
def test_refuses_channels_per_sequence():
    named = inputs(8, 12, 20, biases=False)
    with pytest.raises(BackendError, match="per sequence"):
        triton.subset_ffn(named["x_TD"], named["w_up_FD"], named["w_down_DF"], chosen(20, 10).view(2, 5))
