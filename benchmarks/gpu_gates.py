"""Correctness gates of benchmarks/gpu_all.py, one per op: every Triton path against naive in fp64.

A gate is `(device, interpreted) -> {path: worst relative error}` and raises GateError on the first error too large.
"Interpreted" means Triton's CPU interpreter: smaller shapes, and no bfloat16 where a kernel does its own dot.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BEFORE_RELU = ("d x_TD", "d w_gate_FD", "d w_up_FD", "d b_gate_F", "d b_up_F")
"""What ReLU's derivative reaches. It jumps: preactivations are saved without their bias, and rounding them before it is
added changes the sign of a few. That one rounding alone, in fp64 otherwise, is a relative error of 2.5e-2 in bf16
(0.04 % of the signs) and 8.9e-3 in fp16, and so it was on a GPU."""


def _allowed(name: str, dtype: torch.dtype, act: str) -> float:
    import torch

    from fallow.bench.gate import TOLERANCE

    flips = {torch.bfloat16: 4e-2, torch.float16: 1.2e-2}
    return flips.get(dtype, TOLERANCE[dtype]) if act == "relu" and name in BEFORE_RELU else TOLERANCE[dtype]


def gate_subset_ffn(device: str, interpreted: bool) -> dict[str, float]:
    """Both Triton variants against naive in fp64: value and every gradient, each dtype, activation, mode and shape."""
    import torch

    from fallow.bench.gate import TOLERANCE, relative_error
    from fallow.errors import GateError
    from fallow.ops.subset_ffn import ACTIVATIONS, OMIT_IN, naive, triton

    T, D, F, K = (19, 24, 40, 17) if interpreted else (333, 136, 520, 261)  # ragged on purpose
    worst: dict[str, float] = {}
    for variant, dtype in product(triton.VARIANTS, TOLERANCE):
        path = f"triton-{variant}/{str(dtype).removeprefix('torch.')}"
        if interpreted and variant == "fused" and dtype == torch.bfloat16:
            print(f"  {path}: left out, the interpreter's dot has no bfloat16")
            continue
        for act, omit_in, gated in product(ACTIVATIONS, OMIT_IN, (True, False)):
            g = torch.Generator().manual_seed(11)
            shapes = {"x_TD": (T, D), "w_up_FD": (F, D), "w_down_DF": (D, F), "b_up_F": (F,), "b_down_D": (D,)}
            shapes |= {"w_gate_FD": (F, D), "b_gate_F": (F,)} if gated else {}
            named = {k: (torch.randn(s, generator=g) / s[-1] ** 0.5).to(dtype).to(device) for k, s in shapes.items()}
            dy = torch.randn((T, D), generator=g).to(dtype).to(device)
            idx = torch.randperm(F, generator=g)[:K].sort().values.to(device)
            options = {"act": act, "omit_in": omit_in}
            got = _value_and_gradients(triton.subset_ffn, named, idx, dy, options | {"variant": variant})
            exact = {k: v.double() for k, v in named.items()}
            want = _value_and_gradients(naive.subset_ffn, exact, idx, dy.double(), options)
            for name, reference in want.items():
                error, allowed = relative_error(got[name], reference), _allowed(name, dtype, act)
                worst[path] = max(worst.get(path, 0.0), error)
                if error > allowed:
                    raise GateError(
                        f"{path}: {name} differs from naive by {error:.1e} ({act}, {omit_in},"
                        f" {'gated' if gated else 'plain'}); {allowed:.0e} is allowed; no speed is reported"
                    )
    return worst


def _value_and_gradients(
    op: Callable[..., Tensor], named: dict[str, Tensor], idx: Tensor | None, dy: Tensor, options: dict[str, str]
) -> dict[str, Tensor]:
    leaves = {k: v.clone().requires_grad_() for k, v in named.items()}
    first = ("x_TD", "w_up_FD", "w_down_DF")
    y = op(*(leaves[k] for k in first), idx, **{k: v for k, v in leaves.items() if k not in first}, **options)
    y.backward(dy)
    return {"y": y.detach()} | {f"d {k}": v.grad for k, v in leaves.items() if v.grad is not None}
