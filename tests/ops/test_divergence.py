"""The divergence of two distributions against torch's, in value and gradient, by both backends."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from fallow.errors import ConfigError
from fallow.ops import divergence as op
from fallow.ops.divergence import cpu, naive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(1, 7), (5, 64), (300, 201)])
@pytest.mark.parametrize("backend", [cpu, naive], ids=lambda b: b.name)
def test_value_and_gradient(backend, rows, width, dtype):
    if not backend.available()[0]:
        pytest.skip(backend.available()[1])
    g = torch.Generator().manual_seed(rows)
    s, t = ((torch.randn(rows, width, generator=g) * 4).to(dtype) for _ in range(2))
    exact = s.double().requires_grad_(True)
    wanted = kl_div(exact.log_softmax(1), t.double().log_softmax(1), reduction="sum", log_target=True)
    wanted.backward()
    found, gradient = backend.divergence(s, t)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5, abs=1e-5)
    assert exact.grad is not None
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_autograd_scales_and_leaves_the_teacher_alone():
    s, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    (op.divergence(s, t) * 3).backward()
    assert t.grad is None
    torch.testing.assert_close(s.grad, 3 * (s.softmax(1) - t.softmax(1)).detach())
    assert op.last_used in ("native", "naive")


def test_same_distribution_is_at_no_distance():
    s = torch.randn(4, 9)
    assert float(op.divergence(s, s + 5)) == pytest.approx(0, abs=1e-5)


def test_other_vocabularies_are_refused():
    with pytest.raises(ConfigError, match="one vocabulary"):
        op.divergence(torch.randn(4, 9), torch.randn(4, 8))
