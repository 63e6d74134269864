"""SMET on a GPU, for benchmarks/gpu_all.py: whole training steps, and single layers of tiles.

A step is zero_grad, forward, backward and AdamW with fp32 masters, in bf16. Dense also runs with torch's fused AdamW
on fp32 masters, so that a sparse step cannot look fast only because fallow's own optimizer, many passes on a GPU, has
fewer weights to walk. Sparse steps are timed after a topology update, when every weight has a clock of its own; what an
update costs is timed apart. Single weights cost dense's FLOPs, so their ideal is 1. Bytes are the peak of one step over
what was allocated before its model was built.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from gpu_smet_gate import gate_smet
from gpu_timing import SEQ_LEN, SEQUENCES, Row, Settings, Step, case_named, compile_options, interleave

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fallow import SMET
    from fallow.bench.harness import Timing
    from fallow.bench.steps import Case, Form

STEP_CASES = ("1b-layer", "7b-layer")
STEP_DENSITIES = (0.25, 0.5)
LAYERS = ((5504, 2048), (11008, 4096))
LAYER_DENSITIES = (0.1, 0.25, 0.5)
BLOCKS = (64, 128)
TARGETS = {("single", 0.25): 1 / 1.1, ("single", 0.5): 1 / 1.1, ("block 64", 0.25): 2.0, ("block 128", 0.25): 2.0}
"""Least ratio dense / sparse of a whole step that SMET was set, by (form, density)."""

__all__ = ["bench_smet", "break_even_by_form", "gate_smet"]


# -- whole steps ------------------------------------------------------------------------------------------------------


def bench_smet(settings: Settings) -> list[Row]:
    """Steps of one decoder layer (case by case), then single layers."""
    import torch

    rows: list[Row] = []
    for bench in (*(partial(bench_steps, name) for name in STEP_CASES), *(partial(bench_tiles, s) for s in LAYERS)):
        rows += bench(settings)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def bench_steps(name: str, settings: Settings) -> list[Row]:
    """A whole training step of one decoder layer: single weights and tiles against dense, eager and compiled."""
    import fallow
    from fallow.bench.smet import _ideal

    case, options = case_named(name), {"dynamic": False}
    scratch = _warm_scratch(case, settings)
    peaks: dict[str, int] = {}
    dense: dict[str, Form] = {}
    for form, how in compile_options(settings).items():
        dense[form] = _built(case, None, how, settings, form, peaks)
    dense["dense/fallow-adamw"] = _built(case, None, options, settings, "dense/fallow-adamw", peaks, own_adamw=True)
    rows = []
    for density in STEP_DENSITIES:
        configs = {
            "single" if block is None else f"block {block}": fallow.SMET(density=density, block=block)
            for block in (None, *BLOCKS)
        }
        sparse: dict[str, Form] = {}
        for kind, config in configs.items():
            for variant, how in {"eager": {}, "compiled": options}.items():
                form = f"sparse/{kind}/{variant}"
                sparse[form] = _built(case, config, how, settings, form, peaks)
                peaks[form] += scratch if config.block is None else 0
        forms = dense | sparse
        timing = interleave({n: f.step for n, f in forms.items()}, settings)
        optimizers = interleave({n: f.optimizer.step for n, f in forms.items()}, settings)
        for kind, config in configs.items():
            best = timing.fastest(f"sparse/{kind}/")
            flops = case.shape.step_flops(case.tokens, SEQ_LEN)
            row = _row(name, kind, density, timing, best, _ideal(case, config), flops, peaks)
            row |= {"dense_optimizer_ms": 1e3 * optimizers.median(str(row["dense_form"]))}
            row |= {"optimizer_ms": 1e3 * optimizers.median(best)} | _update_cost(forms[best], row)
            _print(row, TARGETS.get((kind, density)))
            rows.append(row)
        sparse.clear()
        forms.clear()
    return rows


def _warm_scratch(case: Case, settings: Settings) -> int:
    """Bytes of the buffer that packed layers share, one per stream. Made here, so that no form's peak holds it; every
    packed form is charged with it."""
    import torch

    from fallow.ops import packed

    s = case.shape
    layout = packed.layout_of(torch.eye(s.ffn, s.d_model, dtype=torch.bool, device=settings.device))
    x, values = (torch.ones(n, device=settings.device).bfloat16() for n in (s.d_model, layout.n_active))
    y = packed.packed_linear(x[None].requires_grad_(), values.requires_grad_(), layout.bitmap_OB, layout.start_O1)
    y.sum().backward()
    return s.ffn * s.d_model * x.element_size()


def _built(
    case: Case, config: SMET | None, options: dict[str, Any], settings: Settings, form: str, peaks: dict[str, int],
    *, own_adamw: bool = False,
) -> Form:  # fmt: skip
    """A form of the step, warm, its topology moved once; notes the peak bytes of one step in `peaks`."""
    import torch

    import fallow
    from fallow.bench.steps import Form, build, layers_of
    from fallow.optim import adamw_for

    gc.collect()
    before = torch.cuda.memory_allocated()
    model: Any = build(case, torch.bfloat16)
    model.to(settings.device)
    handle = None if config is None else fallow.sparsify(model, config)
    if handle is not None:
        optimizer = handle.optimizer(lr=1e-5)
    else:
        optimizer = adamw_for(model, lr=1e-5) if own_adamw else _FusedMasters(model.parameters())
    for layer in layers_of(model) if options else ():
        layer.compile(**options)
    ids = torch.randint(0, 256, (SEQUENCES, SEQ_LEN), device=settings.device)
    first = config.update_every - 1 if config is not None else 0
    built = Form(model=model, optimizer=optimizer, ids=ids, fast=False, handle=handle, steps=first)  # type: ignore[arg-type]
    for _ in range(3):
        built.step()
    torch.cuda.reset_peak_memory_stats()
    built.step()
    torch.cuda.synchronize()
    peaks[form] = torch.cuda.max_memory_allocated() - before
    return built


class _FusedMasters:
    """torch's fused AdamW on fp32 masters of bf16 parameters: the usual mixed-precision step."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        import torch

        self.params = list(params)
        self.masters = [p.detach().float() for p in self.params]
        self.inner = torch.optim.AdamW(self.masters, lr=1e-5, weight_decay=0.0, fused=True)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def step(self) -> None:
        import torch

        for p, master in zip(self.params, self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        self.inner.step()
        for master in self.masters:
            master.grad = None
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.params], self.masters)  # type: ignore[attr-defined]  # no stub


def _update_cost(form: Form, row: Row) -> Row:
    """What a topology update takes (the second one, of a form already timed), and the step's time with its share."""
    import torch

    assert form.handle is not None
    every = form.handle.config.update_every
    form.handle.before_step(2 * every - 1, 1 << 30)
    torch.cuda.synchronize()
    began = time.perf_counter()
    form.handle.after_step(2 * every - 1, 1 << 30)
    torch.cuda.synchronize()
    update_ms = 1e3 * (time.perf_counter() - began)
    whole = row["sparse_ms"] + update_ms / every
    return {"update_ms": update_ms, "step_time_with_updates": whole / row["dense_ms"]}


# -- single layers ----------------------------------------------------------------------------------------------------


def bench_tiles(shape: tuple[int, int], settings: Settings) -> list[Row]:
    """Forward and backward of one linear layer [O, I]: tiles against dense."""
    import torch
    from torch.nn.functional import linear

    from fallow.methods.smet import topology
    from fallow.ops.block_linear import block_linear, tiles_of

    n_out, n_in = shape
    tokens, name = SEQUENCES * SEQ_LEN, f"layer-{n_in}x{n_out}"
    x = torch.randn(tokens, n_in, device=settings.device).bfloat16().requires_grad_()
    dy = torch.randn(tokens, n_out, device=settings.device).bfloat16()

    def step(op: Any, weight: Tensor) -> Step:
        def run() -> None:
            x.grad = weight.grad = None
            op(x, weight).backward(dy)

        return run

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, device=settings.device).mul_(0.02).bfloat16().requires_grad_()

    forms = {
        form: step(torch.compile(linear, **options) if options else linear, leaf(n_out, n_in))
        for form, options in compile_options(settings).items()
    }
    kept: dict[str, tuple[int, float]] = {}
    for block, density in product(BLOCKS, LAYER_DENSITIES):
        grid = (n_out // block, n_in // block)
        count = topology.active_count(grid, density, per_row=True)
        mask = topology.first_mask(None, grid, count, per_row=True, g=topology.generator(0, 0, 0))
        tiles = tiles_of(mask.to(settings.device), n_out, n_in, block)
        op = partial(lambda x, values, tiles: block_linear(x, values, tiles), tiles=tiles)
        form = f"sparse/block {block}/{density}"
        forms[form] = step(op, leaf(int(mask.sum()), block, block))
        kept[form] = block, count / grid[1]  # whole tiles: 0.1 of 16 is 2
    timing, peaks = interleave(forms, settings), {form: _peak(run) for form, run in forms.items()}
    rows, flops = [], 6 * tokens * n_out * n_in
    for form, (block, density) in kept.items():
        rows.append(_row(name, f"block {block}", density, timing, form, 1 / density, flops, peaks))
        _print(rows[-1], None)
    return rows


def _peak(step: Step) -> int:
    """Bytes a step needs on top of what is there."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# -- rows -------------------------------------------------------------------------------------------------------------


def _row(
    case: str, kind: str, density: float, timing: Timing, form: str, ideal: float, flops: float, peaks: dict[str, int]
) -> Row:
    """One sparse form against the fastest dense one."""
    from fallow.ops import used

    dense = timing.fastest("dense/")
    ratio = timing.ratio(dense, form)
    mine = [f for f in timing.seconds if f.startswith("dense/") or f == form or f.startswith(f"sparse/{kind}/")]
    return {
        "case": case,
        "dtype": "bfloat16",
        "tokens": SEQUENCES * SEQ_LEN,
        "density": density,
        "form": kind,
        "dense_ms": 1e3 * timing.median(dense),
        "sparse_ms": 1e3 * timing.median(form),
        "ratio": ratio,
        "ratio_quartiles": timing.spread(dense, form),
        "ideal": ideal,
        "efficiency": ratio / ideal,
        "step_time": 1 / ratio,
        "backend": used().get("packed" if kind == "single" else "block_linear", "none"),
        "dense_form": dense,
        "sparse_form": form,
        "dense_tflops": flops / timing.median(dense) / 1e12,
        "dense_peak_bytes": peaks[dense],
        "peak_bytes": peaks[form],
        "forms_ms": {f: 1e3 * timing.median(f) for f in mine},
        "forms_peak_bytes": {f: peaks[f] for f in mine},
    }


def _print(row: Row, target: float | None) -> None:
    verdict = ""
    if target is not None:
        row["target"] = target
        verdict = f"; target {target:.2f}x {'met' if row['ratio'] >= target else 'missed'}"
    print(
        f"  {row['case']:16} {row['form']:9} density {row['density']:.2f} {row['sparse_ms']:8.3f} ms,"
        f" dense {row['dense_ms']:8.3f} ms ({row['dense_form']}): {row['ratio']:.2f}x of {row['ideal']:.2f}x ideal,"
        f" peak {row['peak_bytes'] / 2**20:.0f} of {row['dense_peak_bytes'] / 2**20:.0f} MiB{verdict}"
    )


def break_even_by_form(rows: list[Row]) -> dict[str, float | None]:
    """Density of tiles at which a form costs as much as dense, per case and block; None if there is none."""
    from fallow.bench.smet import break_even

    return break_even([r | {"case": f"{r['case']}/{r['form']}"} for r in rows])
