"""Every GPU benchmark of fallow in one command: correctness gates first, then speed, then one JSON file per benchmark.

    python benchmarks/gpu_all.py                      # all, on the first CUDA device
    python benchmarks/gpu_all.py --only sat --quick   # fewer rounds, no max-autotune baseline
    python benchmarks/gpu_all.py --only upcycle --part decode   # its gate, and whole decoding alone
    python benchmarks/gpu_all.py --only upcycle --part core     # its gate, the FFN, decoding of 7B: 90 seconds
    python benchmarks/gpu_all.py --interpret-check    # no GPU: the gates only, through Triton's interpreter

The figure is forward + backward of one layer ("smet": a whole training step; "ssd": an FFN), bf16, 4×2,048 tokens,
selection included, against the fastest dense form found (eager, compiled, max-autotune); of "upcycle" it is decoding,
an FFN of 1 to 8 tokens and a model's step. Forms run interleaved in one process, timed by CUDA events; a ratio is the
median of ratios within a round. A red gate prints no ratio. A further op joins `BENCHES` with one row.
Exit codes: 0 done, 1 a gate is red, 2 this machine cannot run it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_smet
import gpu_ssd
import gpu_upcycle
from gpu_gates import gate_subset_ffn
from gpu_timing import SEQ_LEN, SEQUENCES, Row, Settings, Step, case_named, compile_options, interleave

if TYPE_CHECKING:
    from torch import Tensor

    from fallow.bench.harness import Timing

LAYERS = ("1b-layer", "7b-layer", "8b-layer")
RATES = (0.25, 0.5)


@dataclass(kw_only=True, slots=True, frozen=True)
class Bench:
    name: str
    gate: Callable[[str, bool], dict[str, float]]
    """(device, interpreted) -> worst relative error per path; raises GateError on one that is too large."""
    run: Callable[[Settings], Iterable[Row]]
    """Settings -> rows. What they are worth is written as they come, so that a kill leaves what was measured."""
    break_even: Callable[[list[Row]], dict[str, float | None]]
    """Rows -> per case and form, the `rate` at which it costs as much as dense; None if there is none."""
    rate: str
    """What is varied: "omission rate", …"""
    parts: tuple[str, ...] = ()
    """Names of parts that can be run alone."""


def _rows(case: str, rate: float, timing: Timing, ideal: float, dense_flops: float, **more: object) -> list[Row]:
    """One row per sparse form, against the fastest dense form."""
    dense = timing.fastest("dense/")
    rows = []
    for form in (f for f in timing.seconds if f.startswith("sparse/")):
        ratio = timing.ratio(dense, form)
        row = {
            "case": case,
            "dtype": "bfloat16",
            "tokens": SEQUENCES * SEQ_LEN,
            "omit": rate,
            "dense_ms": 1e3 * timing.median(dense),
            "sparse_ms": 1e3 * timing.median(form),
            "ratio": ratio,
            "ratio_quartiles": timing.spread(dense, form),
            "ideal": ideal,
            "efficiency": ratio / ideal,
            "backend": form.removeprefix("sparse/"),
            "dense_form": dense,
            "dense_tflops": dense_flops / timing.median(dense) / 1e12,
            "dense_forms_ms": {f: 1e3 * timing.median(f) for f in timing.seconds if f.startswith("dense/")},
        } | more
        print(
            f"  {case:10} omit {rate:.2f} {row['backend']:16} {row['sparse_ms']:8.3f} ms,"
            f" dense {row['dense_ms']:8.3f} ms ({dense}): {ratio:.2f}x"
            f" of {ideal:.2f}x ideal, efficiency {ratio / ideal:.0%}"
        )
        rows.append(row)
    return rows


def bench_ffn(name: str, rate: float, omit_in: str, settings: Settings) -> list[Row]:
    """The FFN alone: both Triton variants and the torch-only backend; tells which variant should be the default."""
    import torch

    from fallow.methods.sat.schedule import kept_channels
    from fallow.ops.subset_ffn import cpu, naive, triton

    s = case_named(name).shape
    tokens = SEQUENCES * SEQ_LEN
    shapes = {
        "x_TD": (tokens, s.d_model),
        "w_up_FD": (s.ffn, s.d_model),
        "w_down_DF": (s.d_model, s.ffn),
        "w_gate_FD": (s.ffn, s.d_model),
    }
    leaves = {
        k: torch.randn(v, device=settings.device).mul_(0.02).bfloat16().requires_grad_() for k, v in shapes.items()
    }
    dy = torch.randn((tokens, s.d_model), device=settings.device, dtype=torch.bfloat16)
    K = kept_channels(s.ffn, rate)
    idx = torch.randperm(s.ffn, device=settings.device)[:K].sort().values

    def step(op: Callable[..., Tensor], idx: Tensor | None, **options: str) -> Step:
        def run() -> None:
            for leaf in leaves.values():
                leaf.grad = None
            x, up, down = leaves["x_TD"], leaves["w_up_FD"], leaves["w_down_DF"]
            op(x, up, down, idx, w_gate_FD=leaves["w_gate_FD"], act="silu", **options).backward(dy)

        return run

    forms = {
        form: step(torch.compile(naive.subset_ffn, **options) if options else naive.subset_ffn, None)
        for form, options in compile_options(settings).items()
    }
    for variant in triton.VARIANTS:
        forms[f"sparse/triton-{variant}"] = step(triton.subset_ffn, idx, omit_in=omit_in, variant=variant)
    forms["sparse/torch"] = step(cpu.subset_ffn, idx, omit_in=omit_in)
    kept = K / s.ffn
    ideal = 1 / kept if omit_in == "forward+backward" else 3 / (1 + 2 * kept)
    flops = 3 * s.ffn_flops(tokens, 1.0)
    case = name.replace("layer", "ffn")
    return _rows(case, rate, interleave(forms, settings), ideal, flops, omit_in=omit_in, heads=0.0)


def bench_layer(name: str, rate: float, settings: Settings) -> list[Row]:
    """A whole decoder layer in SAT, channels and heads at one rate; eager and compiled."""
    import torch

    import fallow
    from fallow.bench.steps import build
    from fallow.ops import used

    case = case_named(name)
    stock: Any = build(case, torch.bfloat16)
    ids = torch.randint(0, 256, (SEQUENCES, SEQ_LEN), device=settings.device)

    def step(model: Any, before: Callable[[], object]) -> Step:
        def run() -> None:
            before()
            model.zero_grad(set_to_none=True)
            model(input_ids=ids).last_hidden_state.float().square().mean().backward()

        return run

    def compiled(model: Any, options: dict[str, Any]) -> Any:
        for layer in model.layers if options else ():
            layer.compile(**options)
        return model

    forms: dict[str, Step] = {}
    for form, options in compile_options(settings).items():
        forms[form] = step(compiled(copy.deepcopy(stock).to(settings.device), options), lambda: None)
    handles = []
    for form, options in {"sparse/eager": {}, "sparse/compiled": {"dynamic": False}}.items():
        model = copy.deepcopy(stock).to(settings.device)
        handle = fallow.sparsify(model, fallow.SAT(omit=rate, heads=rate, ladder=0))
        count = iter(range(1 << 30))
        before = lambda h=handle, c=count: h.before_step(next(c), 1 << 30)  # noqa: E731
        forms[form] = step(compiled(model, options), before)
        handles.append(handle)
    timing = interleave(forms, settings)
    rates = handles[0].layer_metrics()
    dense_flops = case.shape.step_flops(case.tokens, SEQ_LEN)
    kept = [[1 - r for r in rates[k]] for k in ("omit_ffn", "omit_heads")]
    ideal = dense_flops / case.shape.step_flops(case.tokens, SEQ_LEN, *kept)
    return _rows(name, rate, timing, ideal, dense_flops, heads=rate, omit_in="forward+backward", ops=used())


def bench_sat(settings: Settings) -> list[Row]:
    import torch

    rows = []
    for name, rate in product(LAYERS, RATES):
        for omit_in in ("forward+backward", "backward"):
            rows += bench_ffn(name, rate, omit_in, settings)
        rows += bench_layer(name, rate, settings)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def break_even_by_form(rows: list[Row]) -> dict[str, float | None]:
    """Omission rate at which a form costs as much as dense, per case, form and mode; None if there is none."""
    from fallow.bench.sat import break_even

    return break_even([r | {"case": f"{r['case']}/{r['backend']}/{r['omit_in']}"} for r in rows])


BENCHES = [
    Bench(name="sat", gate=gate_subset_ffn, run=bench_sat, break_even=break_even_by_form, rate="omission rate"),
    Bench(
        name="smet",
        gate=gpu_smet.gate_smet,
        run=gpu_smet.bench_smet,
        break_even=gpu_smet.break_even_by_form,
        rate="density",
    ),
    Bench(
        name="ssd", gate=gpu_ssd.gate_ssd, run=gpu_ssd.bench_ssd, break_even=gpu_ssd.break_even_by_form, rate="share"
    ),
    Bench(
        name="upcycle",
        gate=gpu_upcycle.gate_upcycle,
        run=gpu_upcycle.bench_upcycle,
        break_even=gpu_upcycle.break_even_by_form,
        rate="tokens",
        parts=gpu_upcycle.PARTS,
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[b.name for b in BENCHES], help="run one benchmark")
    parser.add_argument("--part", help="with --only upcycle: ffn, decode, or core (of both); the gate runs always")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder of NAME-DEVICE.json")
    parser.add_argument("--quick", action="store_true", help="10 rounds, no max-autotune baseline")
    parser.add_argument("--interpret-check", action="store_true", help="gates only, on the CPU; prints no speed")
    args = parser.parse_args()
    if args.part and not any(b.name == args.only and args.part in b.parts for b in BENCHES):
        parser.error(f"--part {args.part} is no part of the benchmark that --only names")
    if args.interpret_check:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, at import
    import torch

    from fallow.errors import GateError
    from fallow.machine import describe, versions
    from fallow.ops.subset_ffn import triton

    if not args.interpret_check and not torch.cuda.is_available():
        print("gpu_all: no CUDA device; use --interpret-check for the gates alone", file=sys.stderr)
        return 2
    ok, reason = triton.available()
    if not ok:
        print(f"gpu_all: {reason}", file=sys.stderr)
        return 2
    settings = Settings(rounds=10, max_autotune=False, part=args.part) if args.quick else Settings(part=args.part)
    for bench in (b for b in BENCHES if args.only in (None, b.name)):
        print(f"{bench.name}: gate", flush=True)
        began = time.perf_counter()
        try:
            errors = bench.gate("cpu" if args.interpret_check else "cuda", args.interpret_check)
        except GateError as error:
            print(f"gpu_all: {error}", file=sys.stderr)
            return 1
        for path, error in errors.items():
            print(f"  {path}: passed, worst relative error {error:.1e}")
        print(f"  [gate: {time.perf_counter() - began:.1f} s]", flush=True)
        if args.interpret_check:
            continue
        result = {"bench": bench.name, "machine": describe(), "versions": versions(), "gate": "passed"}
        result |= {"gate_errors": errors, "complete": False, "rows": []}
        device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{bench.name}-{device}.json"
        for row in bench.run(settings):
            result["rows"].append(row)
            path.write_text(json.dumps(result, indent=1) + "\n")
        result |= {"complete": True, "break_even": bench.break_even(result["rows"])}
        for form, rate in result["break_even"].items():
            print(f"  {form}: break-even at {bench.rate} {'not found' if rate is None else f'{rate:.2f}'}")
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
        print(f"  [{bench.name}: {time.perf_counter() - began:.1f} s]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
