"""Packed sparse weights: every backend against the naive truth, and the linear layer against a masked dense one."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from tests.interpreter import INTERPRETED, passes_interpreted
from torch.nn.functional import linear

from fallow.errors import BackendError, CheckpointError, ConfigError
from fallow.ops import packed
from fallow.ops.packed import cpu, naive, triton

SHAPES = [(1, 1), (7, 13), (5, 8), (33, 64), (64, 100), (3, 31), (17, 257)]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]

needs_native = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])


def case(shape, density, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < density
    dense = (torch.randn(shape, generator=g) * 50).abs().to(dtype)
    return mask, dense, packed.layout_of(mask)


def poison(dtype):
    return 255 if dtype == torch.uint8 else float("nan")


def test_bits_are_where_the_layout_says():
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, 3] = mask[1, 8] = mask[1, 10] = True
    layout = packed.layout_of(mask)
    assert layout.bitmap_OB.tolist() == [[8, 0], [0, 5]]
    assert layout.start_O1.tolist() == [0, 1, 3]
    assert torch.equal(layout.mask(), mask)


@needs_native
@pytest.mark.parametrize("level", [0, 1, 2], ids=["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_moves_the_same_bits_as_naive(shape, density, dtype, level):
    mask, dense, layout = case(shape, density, dtype)
    want = dense[mask]
    guarded = torch.full((layout.n_active + 8,), poison(dtype), dtype=dtype)
    cpu.compress(dense, layout.bitmap_OB, layout.start_O1, guarded[: layout.n_active], level=level)
    assert torch.equal(guarded[: layout.n_active], want)
    after = guarded[layout.n_active :]
    assert (after == 255).all() if dtype == torch.uint8 else after.isnan().all(), "wrote past the end"
    out = torch.full(shape, poison(dtype), dtype=dtype)
    cpu.expand(want, layout.bitmap_OB, layout.start_O1, out, level=level)
    assert torch.equal(out, torch.where(mask, dense, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_result(threads):
    mask, dense, layout = case((37, 129), 0.3, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = packed.compress(dense, layout)
        assert torch.equal(values, dense[mask])
        assert torch.equal(packed.expand(values, layout), dense * mask)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_packed_linear_is_the_masked_dense_layer(density, bias, dtype):
    mask, _, layout = case((24, 37), density, dtype)
    g = torch.Generator().manual_seed(1)
    x, b = (torch.randn(s, generator=g).to(dtype).requires_grad_() for s in ((3, 5, 37), (24,)))
    weight = (torch.randn(24, 37, generator=g).to(dtype) * mask).requires_grad_()
    values = packed.compress(weight.detach(), layout).requires_grad_()
    x2, b2 = x.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    packed.scratch((24, 37), dtype, x.device).fill_(float("nan"))
    got = packed.packed_linear(x, values, layout.bitmap_OB, layout.start_O1, b if bias else None)
    want = linear(x2, weight, b2 if bias else None)
    assert torch.equal(got, want)
    dy = torch.randn(want.shape, generator=g).to(dtype)
    packed.scratch((24, 37), dtype, x.device).fill_(float("nan"))
    got.backward(dy)
    want.backward(dy)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(x.grad, x2.grad, **tolerance)
    torch.testing.assert_close(values.grad, weight.grad[mask], **tolerance)
    if bias:
        torch.testing.assert_close(b.grad, b2.grad, **tolerance)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_the_weight_gradient_is_the_same_copied_or_not(monkeypatch, amx, limit):
    """dy as autograd hands it on: a view, or one number for all."""
    monkeypatch.setattr(packed.native, "has_amx", lambda: amx)
    monkeypatch.setattr(packed, "_COPIED", limit)
    g = torch.Generator().manual_seed(2)
    x, base = (torch.randn(s, generator=g).bfloat16() for s in ((50, 37), (24, 50)))
    for dy in (base.t(), base.t().contiguous(), torch.ones((), dtype=torch.bfloat16).expand(50, 24)):
        got = torch.full((24, 37), float("nan"), dtype=torch.bfloat16)
        packed._weight_gradient(dy, x, got)
        torch.testing.assert_close(got.double(), dy.double().t() @ x.double(), rtol=1e-2, atol=1e-2)


def test_packed_linear_under_autocast_and_opcheck():
    _, _, layout = case((8, 24), 0.5, torch.float32)
    x = torch.randn(4, 24, requires_grad=True)
    values = torch.randn(layout.n_active, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed.packed_linear(x, values, layout.bitmap_OB, layout.start_O1)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert values.grad.dtype == torch.float32 and values.grad.shape == values.shape
    arguments = (x, values, layout.bitmap_OB, layout.start_O1, torch.randn(8, requires_grad=True))
    torch.library.opcheck(torch.ops.fallow.packed_linear.default, arguments)


def test_nothing_dense_outlives_the_call():
    _, _, layout = case((512, 512), 0.1, torch.float32)
    x = torch.randn(4, 512, requires_grad=True)
    values = torch.randn(layout.n_active, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = packed.packed_linear(x, values, layout.bitmap_OB, layout.start_O1)
    assert sum(t.nbytes for t in saved) < 512 * 512 * 4 / 4, "the expanded weight was saved"
    before = packed.scratch_bytes()
    y.sum().backward()
    assert packed.scratch_bytes() == before, "backward reuses forward's buffer"


def test_scratch_is_one_buffer_of_the_largest_layer(monkeypatch):
    monkeypatch.setattr(packed, "_scratch", packed._Scratch())
    cpu_device = torch.device("cpu")
    packed.scratch((4, 4), torch.float32, cpu_device)
    large = packed.scratch((16, 16), torch.float32, cpu_device)
    again = packed.scratch((4, 5), torch.bfloat16, cpu_device)
    assert again.data_ptr() == large.data_ptr() and again.shape == (4, 5)
    assert packed.scratch_bytes() == 16 * 16 * 4


def test_bad_layouts_are_refused():
    mask, _, layout = case((4, 11), 0.5, torch.float32)
    with pytest.raises(ConfigError, match="bool matrix"):
        packed.layout_of(mask.float())
    with pytest.raises(CheckpointError, match=f"{layout.n_active} active weights, but 3 values"):
        packed.layout_from_bitmap(layout.bitmap_OB, 11, expected=3)
    with pytest.raises(CheckpointError, match="another model"):
        packed.layout_from_bitmap(layout.bitmap_OB, 30)
    broken = layout.bitmap_OB.clone()
    broken[2, 1] |= 0x80
    with pytest.raises(CheckpointError, match="beyond the last of 11 columns"):
        packed.layout_from_bitmap(broken, 11)
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        packed.expand(torch.zeros(layout.n_active), layout, backend="cuda")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this process runs the kernels already")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install 'fallow[gpu]')")
def test_triton_through_the_interpreter():
    passes_interpreted(__file__, "-k", "triton_kernels")


@pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the child process of the test above"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(7, 13), (5, 8), (3, 2100)], ids=str)
def test_triton_kernels_move_the_same_bits_as_naive(shape, dtype):
    device = "cpu" if INTERPRETED else "cuda"
    for density in (0.0, 0.3, 1.0):
        mask, dense, layout = case(shape, density, dtype)
        arguments = (layout.bitmap_OB.to(device), layout.start_O1.to(device))
        values = torch.full((layout.n_active,), poison(dtype), dtype=dtype, device=device)
        triton.compress(dense.to(device), *arguments, values)
        assert torch.equal(values.cpu(), dense[mask])
        out = torch.full(shape, poison(dtype), dtype=dtype, device=device)
        triton.expand(values, *arguments, out)
        assert torch.equal(out.cpu(), torch.where(mask, dense, torch.zeros((), dtype=dtype)))


def test_naive_is_always_there():
    assert naive.available()[0] and naive.usable(torch.zeros(1))[0]
