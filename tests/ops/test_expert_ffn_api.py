"""`expert_ffn` as code calls it: gradients that are asked for, compilation, registration, autocast, bad input."""

from __future__ import annotations

import pytest
import torch
from tests.ops.expert_cases import (
    BIASES,
    call,
    double,
    gradient_like,
    make,
    native,
    poisoned_memory,  # noqa: F401  # in every test of this file
    run,
)

from fallow.errors import BackendError, ConfigError
from fallow.ops import expert_ffn as op


@native
def test_leading_dimensions_and_repeated_backward():
    leaves, choice = make(T=36)
    flat = call(leaves, choice, backend="cpu")
    batched = call({**leaves, "x": leaves["x"].view(3, 12, -1)}, choice, backend="cpu")
    assert torch.equal(batched, flat.view(3, 12, -1))
    dy = gradient_like(flat)
    first = torch.autograd.grad(flat, leaves["w_up"], dy, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(flat, leaves["w_up"], dy)[0])


@native
@pytest.mark.parametrize("wanted", [["x"], ["w_down"], ["b_up"], ["coefficient"], ["w_gate", "x"], ["b_down"]])
def test_only_what_is_asked_for(wanted):
    leaves, choice = make()
    dy = gradient_like(leaves["x"])
    want = run(leaves, choice, dy, backend="cpu")
    some = {n: t.detach().requires_grad_(n in wanted) for n, t in leaves.items()}
    grads = torch.autograd.grad(call(some, choice, backend="cpu"), [some[n] for n in wanted], dy)
    for name, got in zip(wanted, grads, strict=True):
        assert torch.equal(got, want[f"d {name}"]), name


@native
@pytest.mark.parametrize("gated", [True, False])
def test_compiles_without_a_break(gated):
    leaves, choice = make(gated=gated)
    dy = gradient_like(leaves["x"])
    want = run(leaves, choice, dy, backend="cpu")
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    y = compiled(leaves, choice, backend="cpu")
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    for name, a, b in zip(want, (y, *grads), want.values(), strict=True):
        assert torch.equal(a.detach(), b), name


@native
@pytest.mark.parametrize("gated", [True, False])
def test_registration_is_sound(gated):
    leaves, choice = make(T=6, D=8, C=4, gated=gated)
    weights = [leaves.get(n) for n in ("w_gate", "w_up", "w_down", *BIASES)]
    arguments = (leaves["x"], choice, leaves["coefficient"], *weights, "relu", 4, "cpu")
    # the AOT check re-runs the op on NaN-poisoned outputs it treats as free to differ
    torch.library.opcheck(
        op.op.forward, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_autocast_computes_in_its_dtype():
    leaves, choice = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(leaves, choice)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert leaves["w_up"].grad.dtype == torch.float32


def test_other_dtypes_take_the_naive_form():
    leaves, choice = make()
    assert call(double(leaves), choice).dtype == torch.float64
    assert op.last_used == "naive"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"act": "tanh"}, "act='tanh' is not one of silu"),
        ({"experts": 5}, "5 experts do not divide 64 channels"),
        ({"experts": 0}, "0 experts"),
        ({"w_down": torch.zeros(64, 24)}, "shapes do not fit"),
        ({"w_gate": torch.zeros(60, 24)}, "shapes do not fit"),
        ({"choice": torch.zeros(36, 2, dtype=torch.int64)}, "37 tokens"),
        ({"choice": torch.zeros(37, 5, dtype=torch.int64)}, "1 to 4"),
        ({"choice": torch.zeros(37, 2, dtype=torch.int32)}, "int64"),
        ({"coefficient": torch.ones(37, 3)}, "coefficient is"),
    ],
)
def test_bad_input_says_what_to_do(change, match):
    leaves, choice = make()
    options = {n: change.pop(n) for n in ("act", "experts") if n in change}
    choice = change.pop("choice", choice)
    with pytest.raises(ConfigError, match=match):
        call({**leaves, **change}, choice, **options)


@native
@pytest.mark.parametrize("expert", [-1, 4])
def test_expert_out_of_range(expert):
    leaves, choice = make()
    choice[3, 1] = expert
    with pytest.raises(ConfigError, match="there are 0 to 3"):
        call(leaves, choice, backend="cpu")


def test_backend_that_cannot_run():
    leaves, choice = make()
    with pytest.raises(BackendError, match="no backend 'gpu'; it has triton, cpu, naive"):
        call(leaves, choice, backend="gpu")
    with pytest.raises(BackendError, match="float64"):
        call(double(leaves), choice, backend="cpu")
