"""ops/adamw.aged: clocks by table, against dense where all ages agree; bf16 state rounded stochastically."""

from __future__ import annotations

import pytest
import torch

from fallow.ops import adamw
from fallow.ops.adamw import Aged, Hyper, Tensors, cpu, naive

needs_native = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
HYPER = Hyper(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, grad_scale=0.7)
N = 1003


def tables(steps):
    t = torch.as_tensor(steps, dtype=torch.float64)
    return (HYPER.lr / (1 - HYPER.betas[0] ** t)).float(), (1 - HYPER.betas[1] ** t).sqrt().float()


def tensors(param=torch.float32, moments=torch.float32, grad=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, generator=g)
    master = weight.clone() if param == torch.bfloat16 and moments == torch.float32 else None
    return Tensors(
        param=weight.to(param),
        master=master,
        exp_avg=(torch.randn(N, generator=g) * 1e-2).to(moments),
        exp_avg_sq=(torch.rand(N, generator=g) * 1e-3).to(moments),
        grad=torch.randn(N, generator=g).to(grad or param),
    )


def aged(age=None, steps=None, **fields):
    sizes, roots = tables(torch.arange(1, 257) if steps is None else steps)
    age = torch.randint(0, 256, (N,), generator=torch.Generator().manual_seed(5)) if age is None else age
    return Aged(age=age.to(torch.uint8), step_size=sizes, bias2_sqrt=roots, **fields)


def test_one_age_is_the_dense_update():
    a, b = tensors(), tensors()
    naive.aged(a, aged(age=torch.full((N,), 6)), HYPER)
    naive.dense([b], [7], HYPER)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-9)


def test_a_newborn_takes_its_own_first_step():
    """Paper, "local clock": bias correction by the entry's own t; without it the step is 3.16 times as long."""
    hyper = Hyper(lr=1e-2, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
    t = tensors()
    t.param.zero_(), t.exp_avg.zero_(), t.exp_avg_sq.zero_()
    naive.aged(t, aged(age=torch.zeros(N), steps=torch.full((256,), 1)), hyper)
    torch.testing.assert_close(t.param, -1e-2 * t.grad.sign(), rtol=1e-4, atol=0)
    t.param.zero_(), t.exp_avg.zero_(), t.exp_avg_sq.zero_()
    naive.aged(t, aged(age=torch.zeros(N), steps=torch.full((256,), 10_000)), hyper)
    torch.testing.assert_close(t.param, -3.1623e-2 * t.grad.sign(), rtol=1e-3, atol=0)


@needs_native
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16], ids=str)
def test_native_equals_naive(param, moments, grad):
    a, b = tensors(param, moments, grad), tensors(param, moments, grad)
    assert cpu.usable_aged(a)[0]
    for step in range(3):
        ages = aged(salt=0xDEADBEEF + step, offset=123)
        naive.aged(a, ages, HYPER)
        cpu.aged(b, ages, HYPER)
    for name in ("param", "master", "exp_avg", "exp_avg_sq"):
        x, y = getattr(a, name), getattr(b, name)
        if x is None:
            continue
        if x.dtype == torch.bfloat16:  # the same noise: all but the odd entry whose fp32 value differs by an ulp agree
            assert (x != y).float().mean() < 0.01, name
            torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-4)
        else:
            torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-7)


def test_random_bits_are_murmurs():
    def scalar(entry, salt):
        x = (entry * 0x9E3779B9 + salt) & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ (x >> 16)

    entries = torch.tensor([0, 1, 77, 2**31, 2**32 - 1, 2**33 + 5])
    got = naive.random_bits(entries, 0xFFFF1234)
    assert got.tolist() == [scalar(int(e) & 0xFFFFFFFF, 0xFFFF1234) for e in entries]


def test_stochastic_rounding_has_the_right_mean_and_keeps_specials():
    x = torch.full((200_000,), 1.0 + 0.3 / 128)
    noise = naive.random_bits(torch.arange(200_000), 7) & 0xFFFF
    rounded = naive.rounded_stochastically(x, noise)
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    assert abs(float(rounded.double().mean()) - float(x[0])) < 2e-5
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1.5, -2.25])
    out = naive.rounded_stochastically(special, torch.full((6,), 0xFFFF))
    assert out[0] == float("inf") and out[1] == -float("inf") and out[2].isnan()
    assert out[3] == 0 and out[4] == 1.5 + 0 and out[5] == -2.25


@pytest.mark.parametrize("backend", [naive, pytest.param(cpu, marks=needs_native)], ids=["naive", "native"])
def test_a_bf16_second_moment_decays(backend):
    """The trap in the released code: 0.999 v rounds back to v in bf16."""
    t = tensors(torch.bfloat16, torch.bfloat16)
    t.grad.zero_()
    before = t.exp_avg_sq.double().mean()
    for step in range(300):
        backend.aged(t, aged(salt=step), HYPER)
    assert float(t.exp_avg_sq.double().mean() / before) == pytest.approx(0.999**300, rel=0.02)
    stuck = torch.tensor(1e-3, dtype=torch.bfloat16)
    assert stuck * 0.999 == stuck


@needs_native
def test_threads_and_offsets_do_not_change_the_noise():
    whole = tensors(torch.bfloat16, torch.bfloat16)
    parts = tensors(torch.bfloat16, torch.bfloat16)
    ages = aged(salt=99)
    adamw.aged(whole, ages, HYPER)
    for lo, hi in ((0, 400), (400, N)):
        part = Tensors(
            param=parts.param[lo:hi],
            master=None,
            exp_avg=parts.exp_avg[lo:hi],
            exp_avg_sq=parts.exp_avg_sq[lo:hi],
            grad=parts.grad[lo:hi],
        )
        adamw.aged(part, aged(age=ages.age[lo:hi], salt=99, offset=lo), HYPER)
    assert torch.equal(whole.param, parts.param) and torch.equal(whole.exp_avg_sq, parts.exp_avg_sq)
