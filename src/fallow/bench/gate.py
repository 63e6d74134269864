"""Correctness gates: a backend must match the naive truth in value and in every gradient before its speed is
printed."""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.errors import GateError
from fallow.ops import subset_ffn as op
from fallow.ops.subset_ffn import subset_ffn

# relative Frobenius error allowed, by dtype: fp32 sums in another order; bf16 rounds each intermediate (8 bits of
# mantissa)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAMES = ("y", "dx", "dw_gate", "dw_up", "dw_down")


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in fp64; NaN anywhere is infinite."""
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    return float("inf") if not torch.isfinite(error) else float(error)


def _inputs(dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    T, D, F, K = 77, 48, 112, 41  # ragged on purpose
    sizes = ((T, D), (F, D), (F, D), (D, F), (T, D))
    x, w_gate, w_up, w_down, dy = (torch.randn(s, generator=g, dtype=torch.float64) / s[-1] ** 0.5 for s in sizes)
    idx = torch.randperm(F, generator=g)[:K].sort().values.to(device)
    return [t.to(dtype).to(device) for t in (x, w_gate, w_up, w_down)], dy.to(dtype).to(device), idx


def _run(tensors: list[Tensor], dy: Tensor, idx: Tensor, backend: str, act: str, omit_in: str) -> list[Tensor]:
    x, w_gate, w_up, w_down = (t.detach().clone().requires_grad_() for t in tensors)
    y = subset_ffn(x, w_up, w_down, idx, w_gate_FD=w_gate, act=act, omit_in=omit_in, backend=backend)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in (x, w_gate, w_up, w_down) if t.grad is not None)]


def check_subset_ffn(
    *,
    backend: str | None = None,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> dict[str, float]:
    """Worst relative error per dtype of `backend` (default: the one that would run). Raises GateError when one is too
    large."""
    worst: dict[str, float] = {}
    for dtype in dtypes:
        tensors, dy, idx = _inputs(dtype, device)
        exact = [t.double() for t in tensors]
        chosen = backend or op._choose(tensors[0], idx, None).name
        for act in op.ACTIVATIONS:
            for omit_in in ("forward+backward", "backward"):
                want = _run(exact, dy.double(), idx, "naive", act, omit_in)
                got = _run(tensors, dy, idx, chosen, act, omit_in)
                for name, a, b in zip(NAMES, got, want, strict=True):
                    error = relative_error(a, b)
                    if error > TOLERANCE[dtype]:
                        raise GateError(
                            f"subset_ffn/{chosen}: {name} differs from naive by {error:.1e}"
                            f" ({dtype}, {act}, {omit_in}); {TOLERANCE[dtype]:.0e} is allowed; no speed is reported"
                        )
                    worst[f"{chosen}/{dtype}"] = max(worst.get(f"{chosen}/{dtype}", 0.0), error)
    return worst
