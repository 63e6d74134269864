"""Peak memory of training a 1B-shaped model of a few layers, dense and SMET, beside what the bytes promise.

    python benchmarks/smet_memory.py            # benchmarks/results/smet-memory.json

Each form runs in a process of its own: same widths, same tokens, AdamW in the leanest dense form we have (fallow's, one
pass, no temporary copies). The peak is the high-water mark of resident memory over whole training steps, one topology
update among them; on a GPU torch.cuda.max_memory_allocated. The promise is the difference in bytes of model state,
metadata counted. Cost: a minute per form.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fallow
from fallow import machine
from fallow.bench.flops import Shape
from fallow.bench.steps import Case, build
from fallow.optim import adamw_for
from fallow.training.meters import memory_mb, peak_memory_mb, reset_peak_memory

RESULT = Path(__file__).resolve().parent / "results" / "smet-memory.json"
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "smet-25": {"density": 0.25},
    "smet-50": {"density": 0.5},
    "smet-25-unstructured": {"density": 0.25, "structure": "unstructured"},
    "smet-25-gradient": {"density": 0.25, "growth": "gradient"},
    "smet-25-block64": {"density": 0.25, "block": 64},
    "smet-25-bf16state": {"density": 0.25, "state_dtype": "bf16"},
}
MB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--form", choices=list(FORMS), help="measure this one here and print JSON")
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(options.form, options.layers, options.tokens, getattr(torch, options.dtype))))
        return 0
    rows = []
    for form in FORMS:
        flags = ["--layers", str(options.layers), "--tokens", str(options.tokens), "--dtype", options.dtype]
        run = subprocess.run([sys.executable, __file__, "--form", form, *flags], capture_output=True, text=True)
        if run.returncode:
            print(run.stderr, file=sys.stderr)
            return 1
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    dense = rows[0]
    for row in rows[1:]:
        row["promised_fall_mb"] = round(dense["state_mb"] - row["state_mb"], 1)
        row["measured_fall_mb"] = round(dense["peak_mb"] - row["peak_mb"], 1)
        row["kept"] = round(row["measured_fall_mb"] / row["promised_fall_mb"], 4)
        row["state_ratio"] = round(row["sparse_state_mb"] / dense["sparse_state_mb"], 4)
    result = {"experiment": "smet-memory", "command": "python benchmarks/smet_memory.py", "machine": machine.describe()}
    result |= {"layers": options.layers, "tokens": options.tokens, "dtype": options.dtype, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print({k: v for k, v in row.items() if k != "bytes"})
    return 0


def measure(form: str, layers: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Peak of three training steps, and the bytes that are known."""
    shape = Shape(2048, 5632, 32, 4, 64, layers=layers, vocab=1024)
    case = Case("1b", shape, 1, tokens)
    model = build(case, dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]  # transformers types it away
    settings = FORMS[form]
    handle = fallow.sparsify(model, fallow.SMET(update_every=2, **settings)) if settings else None
    optimizer = adamw_for(model, lr=1e-4) if handle is None else handle.optimizer(lr=1e-4)
    ids = torch.randint(0, 1024, (1, tokens), device=device)
    reset_peak_memory(device)
    start = memory_mb(device)
    for step in range(4):  # state is complete after the first; the topology moves after the second
        if handle is not None:
            handle.before_step(step, 100)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if handle is not None:
            handle.after_step(step, 100)
        if step < 3:
            optimizer.zero_grad()
    peak = peak_memory_mb(device)
    state = sum(2 * p.nbytes for p in model.parameters()) + sum(
        s.nbytes for held in optimizer.state.values() for s in held.values() if isinstance(s, torch.Tensor)
    )
    state += sum(b.nbytes for b in model.buffers())
    memory = handle.memory() if handle is not None else None
    sparse = [p for n, p in model.named_parameters() if "layers." in n and p.ndim > 1]
    sparse_mb = sum(16 * p.numel() for p in sparse) / MB if memory is None else memory["sparse_total"] / MB
    return {
        "form": form,
        "peak_mb": round(peak, 1),
        "start_mb": round(start, 1),
        "state_mb": round(state / MB, 1),
        "sparse_state_mb": round(sparse_mb, 1),
        "scratch_mb": round(memory["scratch"] / MB, 1) if memory else 0.0,
        "bytes": memory["sparse"] if memory else None,
    }


if __name__ == "__main__":
    sys.exit(main())
