"""`fallow bench ssd`: an FFN of which each token computes K of E experts, against the dense FFN of the same dtype.

Forward and backward of one gated ReLU FFN on 2,048 tokens, gradients of x, all weights and the routing coefficients.
Dense is three stock linears in autograd, eager and compiled, and the faster one counts. Routing is uniform and another
one at every call, as in training: kernels that are compiled or tuned per size pay for it. `ideal` is E/K, the ratio of
multiplications; `break_even` the share K/E up to which sparse is faster. Nothing is printed when a kernel differs from
its naive truth.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fallow.bench.gate_ssd import check_expert_ffn
from fallow.bench.harness import Step, interleave
from fallow.bench.ssd_steps import CASES, rows_of_steps
from fallow.errors import ConfigError
from fallow.machine import describe
from fallow.ops import expert_ffn as op
from fallow.ops.expert_ffn import expert_ffn

SHAPES = {"ffn-768": (768, 3072), "ffn-wide": (512, 4096), "ffn-2048": (2048, 8192)}
"""Width D and channels F of each case."""
EXPERTS = (8, 16, 32, 64)
SHARES = (1 / 8, 1 / 4, 1 / 2)
DTYPES = (torch.bfloat16, torch.float32)
TOKENS = 2048
_ROUTINGS = 16


def _dense(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def _dense_step(forward: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> Step:
    return lambda: torch.autograd.grad(forward(*leaves), leaves, dy)


def _sparse_step(leaves: list[Tensor], dy: Tensor, experts: int, active: int, g: torch.Generator) -> Step:
    x, *weights = leaves
    routings = cycle([torch.rand(len(x), experts, generator=g).topk(active, dim=1).indices for _ in range(_ROUTINGS)])
    coefficient = torch.ones(len(x), active, requires_grad=True)

    def step() -> object:
        y = expert_ffn(x, next(routings), coefficient, *weights, act="relu", experts=experts)
        return torch.autograd.grad(y, (x, coefficient, *weights), dy)

    return step


def ffn_rows(
    case: str,
    dtype: torch.dtype,
    *,
    rounds: int,
    compiled: bool,
    experts: tuple[int, ...] = EXPERTS,
    shares: tuple[float, ...] = SHARES,
    tokens: int = TOKENS,
) -> list[dict[str, Any]]:
    """One row per number of experts and active share, all timed in the same interleaved rounds."""
    D, channels = SHAPES[case]
    g = torch.Generator().manual_seed(1)
    shapes = ((tokens, D), (channels, D), (channels, D), (D, channels))
    leaves = [(torch.randn(s, generator=g) / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]
    dy = torch.randn(tokens, D, generator=g).to(dtype)
    forms: dict[str, Step] = {"dense/eager": _dense_step(_dense, leaves, dy)}
    if compiled:
        forms["dense/compiled"] = _dense_step(torch.compile(_dense, dynamic=False), leaves, dy)
    pairs = [(E, round(E * share)) for E in experts for share in shares if E * share >= 1]
    forms |= {f"sparse/{E}/{K}": _sparse_step(leaves, dy, E, K, g) for E, K in pairs}
    timing = interleave(forms, rounds=rounds, warm_up=3)
    dense = timing.fastest("dense/")
    rows = []
    for E, K in pairs:
        form = f"sparse/{E}/{K}"
        ratio = timing.ratio(dense, form)
        rows.append(
            {
                "case": case,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "experts": E,
                "active": K,
                "share": K / E,
                "form": f"E{E} K{K}",
                "dense_ms": 1e3 * timing.median(dense),
                "sparse_ms": 1e3 * timing.median(form),
                "ratio": ratio,
                "ratio_quartiles": timing.spread(dense, form),
                "ideal": E / K,
                "efficiency": ratio * K / E,
                "backend": op.last_used,
                "dense_form": dense,
                "dense_forms_ms": {n: 1e3 * timing.median(n) for n in forms if n.startswith("dense/")},
                "rounds": rounds,
            }
        )
    return rows


def break_even(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The largest share of active experts at which sparse is as fast as dense, per case, dtype and number of experts.

    Between two measured shares the cost is taken to be linear; beyond the largest, the line through the last two goes
    on, to 1 at most. None where sparse is slower at every share measured.
    """
    found: dict[str, float | None] = {}
    for key in dict.fromkeys((r["case"], r["dtype"], r["experts"]) for r in rows):
        points = sorted((r["share"], 1 / r["ratio"]) for r in rows if (r["case"], r["dtype"], r["experts"]) == key)
        case, dtype, experts = key
        found[f"{case} {dtype} E{experts}"] = _crossing(points)
    return found


def _crossing(points: list[tuple[float, float]]) -> float | None:
    """Where the cost of `points`, (share, sparse time / dense time), first reaches 1."""
    if points[0][1] > 1:
        return None
    for (s0, c0), (s1, c1) in pairwise(points):
        if c1 > 1:
            return s0 + (s1 - s0) * (1 - c0) / (c1 - c0)
    if len(points) < 2:
        return points[0][0]
    (s0, c0), (s1, c1) = points[-2:]
    return min(1.0, s1 + (1 - c1) * (s1 - s0) / (c1 - c0)) if c1 > c0 else 1.0


def break_even_share(case: str, experts: int, dtype: torch.dtype, *, rounds: int = 5) -> float | None:
    """`break_even` of one shape, measured now; a few seconds. Raises ConfigError for an unknown case."""
    _known([case])
    rows = ffn_rows(case, dtype, rounds=rounds, compiled=False, experts=(experts,))
    return next(iter(break_even(rows).values()))


def _known(cases: list[str]) -> None:
    unknown = sorted(set(cases) - set(SHAPES) - set(CASES))
    if unknown:
        raise ConfigError(f"bench ssd: unknown case {', '.join(unknown)}; use {', '.join((*SHAPES, *CASES))}")


def run(
    cases: list[str] | None = None, *, quick: bool = False, rounds: int | None = None, compiled: bool = True
) -> dict[str, Any]:
    """All rows as one JSON-ready dict (schema: architecture.md).

    Raises:
        ConfigError: an unknown case. GateError: a kernel differs from its truth.
    """
    _known(cases or [])
    gate = check_expert_ffn()
    rows: list[dict[str, Any]] = []
    for case in (c for c in cases or SHAPES if c in SHAPES):
        for dtype in DTYPES:
            rows += ffn_rows(case, dtype, rounds=rounds or (3 if quick else 9), compiled=compiled and not quick)
            gc.collect()
    whole = [c for c in cases or CASES if c in CASES]
    rows += rows_of_steps(whole, rounds=rounds or (3 if quick else 9), compiled=compiled and not quick)
    return {
        "bench": "ssd",
        "machine": describe(),
        "gate": "passed",
        "gate_errors": gate,
        "rows": rows,
        "break_even": break_even([r for r in rows if r["case"] in SHAPES]),
    }
