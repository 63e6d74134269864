"""ops/adamw: naive against torch.optim.AdamW bit for bit, native against naive, whole tensors and subsets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import ConfigError
from fallow.ops import adamw
from fallow.ops.adamw import Hyper, Tensors, cpu, naive

needs_native = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
HYPER = Hyper(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def _tensors(shape, dtype=torch.float32, grad_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    param = weight.to(dtype)
    return Tensors(
        param=param,
        master=None if dtype == torch.float32 else param.float(),
        exp_avg=torch.zeros(shape),
        exp_avg_sq=torch.zeros(shape),
        grad=torch.zeros(shape, dtype=grad_dtype or dtype),
    )


def _new_grad(t, step):
    generator = torch.Generator().manual_seed(step)
    scale = torch.pow(10.0, torch.empty(t.grad.shape).uniform_(-6, 1, generator=generator))
    t.grad = (torch.randn(t.grad.shape, generator=generator) * scale).to(t.grad.dtype)


def _close(found, expected, relative=1e-6):
    for name in ("exp_avg", "exp_avg_sq", "weight"):
        a, b = getattr(found, name), getattr(expected, name)
        # an ulp of the update may show in a weight that is near zero itself: hence lr × relative as the floor
        floor = relative * HYPER.lr if name == "weight" else 0.0
        assert ((a - b).abs() <= relative * b.abs() + floor).all(), f"{name}: {(a - b).abs().max():.1e}"


def test_naive_is_bit_equal_to_torch():
    t = _tensors((33, 17))
    reference = torch.nn.Parameter(t.param.clone())
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 21):
        _new_grad(t, step)
        reference.grad = t.grad.clone()
        optimizer.step()
        naive.dense([t], [step], HYPER)
    assert torch.equal(t.param, reference)
    assert torch.equal(t.exp_avg_sq, optimizer.state[reference]["exp_avg_sq"])


@needs_native
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_equals_naive(dtype, grad_dtype):
    """Many tensors in one call, ragged sizes, one tensor larger than a chunk; weights agree to an ulp of the update."""
    shapes = [(1,), (7, 3), (40000,), (3, 64), (0, 4), (65, 33)]
    found = [_tensors(s, dtype, grad_dtype, seed=i) for i, s in enumerate(shapes)]
    expected = [_tensors(s, dtype, grad_dtype, seed=i) for i, s in enumerate(shapes)]
    hyper = Hyper(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_scale=0.7)
    for step in range(1, 11):
        for a, b in zip(found, expected, strict=True):
            _new_grad(a, step)
            b.grad = a.grad
        cpu.dense(found, [step] * len(found), hyper)
        naive.dense(expected, [step] * len(expected), hyper)
    for a, b in zip(found, expected, strict=True):
        _close(a, b)
        if a.master is not None:
            assert torch.equal(a.param, a.master.to(torch.bfloat16))


@needs_native
def test_rounding_to_bf16_is_torchs():
    """Ties, overflow to infinity, subnormals, NaN: a zero step writes the master through unchanged."""
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    special = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    master = torch.cat([bits, special]).view(torch.float32)
    zeros = torch.zeros_like(master)
    t = Tensors(
        param=zeros.bfloat16(), master=master, exp_avg=zeros.clone(), exp_avg_sq=zeros.clone(), grad=zeros.clone()
    )
    cpu.dense([t], [1], Hyper(lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0))
    expected = master.bfloat16()
    assert torch.equal(t.param.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(t.param[finite].view(torch.int16), expected[finite].view(torch.int16))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 70),
    dim=st.sampled_from([0, 1]),
    bf16=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", [naive, pytest.param(cpu, marks=needs_native)], ids=["naive", "native"])
def test_a_neuron_is_updated_as_if_alone(backend, rows, width, dim, bf16, seed):
    """Each row (column) equals a dense optimizer that saw only its own steps; the others do not change a bit."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    t = _tensors((rows, width), dtype, seed=seed)
    alone = [_tensors((rows, width), dtype, seed=seed) for _ in range(t.param.shape[dim])]
    clock = torch.zeros(t.param.shape[dim], dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, 5):
        _new_grad(t, step)
        index = torch.randperm(len(clock), generator=generator)[
            : int(torch.randint(1, len(clock) + 1, (), generator=generator))
        ]
        omitted = torch.ones(len(clock), dtype=torch.bool).index_fill(0, index, False).nonzero().squeeze(1)
        t.grad.index_fill_(dim, omitted, float("nan"))
        before = t.param.clone()
        backend.subset(t, dim, index, clock, HYPER)
        assert torch.equal(t.param.index_select(dim, omitted), before.index_select(dim, omitted))
        for i in index.tolist():
            alone[i].grad = t.grad
            naive.dense([alone[i]], [int(clock[i])], HYPER)
    for i, reference in enumerate(alone):
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            a, b = getattr(t, name).select(dim, i), getattr(reference, name).select(dim, i)
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), name
        if bf16:
            assert torch.equal(t.param, t.master.to(dtype))


def test_chooses_and_refuses():
    t = _tensors((4, 6))
    clock = torch.zeros(4, dtype=torch.int32)
    adamw.dense([t], [1], HYPER)
    assert adamw.last_used == ("native" if cpu.available()[0] else "naive")
    column = Tensors(param=t.param.T, master=None, exp_avg=t.exp_avg.T, exp_avg_sq=t.exp_avg_sq.T, grad=t.grad.T)
    assert "contiguous" in cpu.usable(column)[1]
    adamw.dense([column], [2], HYPER)
    assert adamw.last_used == "naive"
    with pytest.raises(ConfigError, match="outside"):
        adamw.subset(t, 0, torch.tensor([4]), clock, HYPER)
    with pytest.raises(ConfigError, match="lazy dim"):
        adamw.subset(t, 2, torch.tensor([0]), clock, HYPER)


def test_without_the_library_naive_runs(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: (False, "not built"))
    t = _tensors((4, 6))
    _new_grad(t, 1)
    adamw.dense([t], [1], HYPER)
    assert adamw.last_used == "naive" and t.exp_avg.abs().max() > 0
