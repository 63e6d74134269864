"""SSD on a GPU, for benchmarks/gpu_all.py: an FFN by experts against the dense FFN.

Forward and backward of a gated ReLU FFN at 4096×(8·4096) and 2048×8192, bf16, 4×2,048 tokens, gradients of x, all
weights and the routing coefficients, against the fastest dense form (eager, compiled, max-autotune). Routing is uniform
and another one at every call. The target set for 4096×(8·4096) with a quarter of the experts is 2.2 times, 3 the aim.
"""

from __future__ import annotations

import gc
from itertools import cycle, product
from typing import Any

from gpu_timing import SEQ_LEN, SEQUENCES, Row, Settings, Step, compile_options, interleave

SHAPES = {"ffn-4096x8": (4096, 8 * 4096), "ffn-2048": (2048, 8192)}
EXPERTS = (8, 16, 32)
SHARES = (1 / 8, 1 / 4, 1 / 2)
TARGET = 2.2


def gate_ssd(device: str, interpreted: bool) -> dict[str, float]:
    """Triton against the loop over experts. Raises GateError."""
    import torch

    from fallow.bench.gate_ssd import check_expert_ffn

    dtypes = (torch.float32,) if interpreted else (torch.bfloat16, torch.float32)
    return check_expert_ffn(backend="triton", device=device, dtypes=dtypes)


def bench_ssd(settings: Settings) -> list[Row]:
    """Both shapes, every number of experts and share."""
    import torch

    rows: list[Row] = []
    for case in SHAPES:
        rows += bench_ffn(case, settings)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def bench_ffn(case: str, settings: Settings) -> list[Row]:
    import torch

    from fallow.bench.ssd import _dense, _dense_step
    from fallow.ops.expert_ffn import expert_ffn

    (D, F), tokens = SHAPES[case], SEQUENCES * SEQ_LEN
    shapes = ((tokens, D), (F, D), (F, D), (D, F))
    leaves = [torch.randn(s, device=settings.device).mul_(0.02).bfloat16().requires_grad_() for s in shapes]
    dy = torch.randn(tokens, D, device=settings.device).bfloat16()
    forms: dict[str, Step] = {
        form: _dense_step(torch.compile(_dense, **options) if options else _dense, leaves, dy)
        for form, options in compile_options(settings).items()
    }
    pairs = [(E, round(E * share)) for E, share in product(EXPERTS, SHARES)]

    def sparse(E: int, K: int) -> Step:
        routings = cycle([torch.rand(tokens, E, device=settings.device).topk(K, dim=1).indices for _ in range(8)])
        one = torch.ones(tokens, K, device=settings.device, requires_grad=True)

        def step() -> object:
            y = expert_ffn(leaves[0], next(routings), one, *leaves[1:], act="relu", experts=E)
            return torch.autograd.grad(y, (*leaves, one), dy)

        return step

    forms |= {f"sparse/{E}/{K}": sparse(E, K) for E, K in pairs}
    timing = interleave(forms, settings)
    dense = timing.fastest("dense/")
    rows: list[Row] = []
    for E, K in pairs:
        form = f"sparse/{E}/{K}"
        row: dict[str, Any] = {
            "case": case,
            "dtype": "bfloat16",
            "tokens": tokens,
            "experts": E,
            "active": K,
            "share": K / E,
            "dense_ms": 1e3 * timing.median(dense),
            "sparse_ms": 1e3 * timing.median(form),
            "ratio": timing.ratio(dense, form),
            "ratio_quartiles": timing.spread(dense, form),
            "ideal": E / K,
            "efficiency": timing.ratio(dense, form) * K / E,
            "backend": "triton",
            "dense_form": dense,
            "dense_tflops": 18 * tokens * D * F / timing.median(dense) / 1e12,
        }
        aimed = f" (set: {TARGET}x)" if case == "ffn-4096x8" and row["share"] == 0.25 else ""
        print(
            f"  {case:10} E {E:2} k {K:2} {row['sparse_ms']:8.3f} ms, dense {row['dense_ms']:8.3f} ms ({dense}):"
            f" {row['ratio']:.2f}x of {row['ideal']:.2f}x ideal{aimed}"
        )
        rows.append(row)
    return rows


def break_even_by_form(rows: list[Row]) -> dict[str, float | None]:
    """Share of active experts up to which they are faster than dense, per case and number of experts."""
    from fallow.bench.ssd import break_even

    return break_even(rows)
