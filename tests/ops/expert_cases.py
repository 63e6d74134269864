"""Inputs of `expert_ffn`, and what its results are compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fallow.ops import reuse
from fallow.ops.expert_ffn import cpu, expert_ffn

# relative Frobenius error against fp64: fp32 sums cancel; bf16 rounds the preactivations, the hidden layer and each
# expert's output, by 2^-8 at most each
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]
BIASES = ("b_gate", "b_up", "b_down")
native = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory a kernel forgot to write is NaN, never a lucky zero: fresh from torch, or reused."""
    real = reuse.empty
    monkeypatch.setattr(reuse, "empty", lambda *arguments: real(*arguments).fill_(float("nan")))
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[0]


def choose(T: int, E: int, K: int, g: torch.Generator, *, unused: bool = False) -> torch.Tensor:
    """int64 [T, K], distinct per row; with `unused`, the middle expert gets no token where K leaves one out."""
    score_TE = torch.rand(T, E, generator=g)
    if unused and K < E:
        score_TE[:, E // 2] = -1
    return score_TE.topk(K, dim=1).indices


def make(
    T=37, D=24, C=16, E=4, K=2, *, gated=True, bias=True, coefficient=True, dtype=torch.float32, unused=True, seed=0
):
    """(leaves by name, choice)."""
    g = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"x": (T, D), "w_up": (E * C, D), "w_down": (D, E * C)}
    if gated:
        shapes["w_gate"] = (E * C, D)
    if bias:
        shapes |= {"b_up": (E * C,), "b_down": (D,)} | ({"b_gate": (E * C,)} if gated else {})
    leaves = {n: (torch.randn(s, generator=g) / s[-1] ** 0.5).to(dtype).requires_grad_() for n, s in shapes.items()}
    if coefficient:
        leaves["coefficient"] = torch.ones(T, K, requires_grad=True)
    return leaves, choose(T, E, K, g, unused=unused)


def call(leaves: dict[str, Any], choice, *, act="relu", experts=4, backend=None):
    return expert_ffn(
        leaves["x"],
        choice,
        leaves.get("coefficient"),
        leaves.get("w_gate"),
        leaves["w_up"],
        leaves["w_down"],
        *(leaves.get(n) for n in BIASES),
        act=act,
        experts=experts,
        backend=backend,
    )


def run(leaves, choice, dy, **options) -> dict[str, torch.Tensor]:
    y = call(leaves, choice, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d {n}": t for n, t in zip(leaves, grads, strict=True)}


def gradient_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)


def double(leaves):
    return {n: t.detach().double().requires_grad_() for n, t in leaves.items()}


def assert_close(got, want, dtype, same_dtype=None):
    """Within the tolerance; where few numbers cancel, within twice what naive loses in the same dtype."""
    assert got.keys() == want.keys()
    for name, truth in want.items():
        expected = torch.float32 if name == "d coefficient" else dtype
        assert got[name].dtype == expected and got[name].shape == truth.shape, name
        assert torch.isfinite(got[name]).all(), f"{name} has entries that were never written"
        scale = truth.norm().clamp_min(1e-30)
        error = (got[name].double() - truth).norm() / scale
        own = 0.0 if same_dtype is None else (same_dtype[name].double() - truth).norm() / scale
        assert error <= max(TOLERANCE[dtype], 2 * own), f"{name}: relative error {error:.1e}, naive's {own:.1e}"


def assert_equals_naive(leaves, choice, *, act="relu", experts=4, backend="cpu"):
    dy, dtype = gradient_like(leaves["x"]), leaves["x"].dtype
    got = run(leaves, choice, dy, act=act, experts=experts, backend=backend)
    want = run(double(leaves), choice, dy.double(), act=act, experts=experts, backend="naive")
    same_dtype = run(leaves, choice, dy, act=act, experts=experts, backend="naive")
    assert_close(got, want, dtype, same_dtype)
