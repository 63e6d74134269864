"""MoE inference against dense, same weights, same stock engine: transformers on exported folders, llama.cpp on GGUF.

    python benchmarks/ssd_export.py            # benchmarks/results/ssd-export.json

A wide ReGLU model with random weights is grouped by SSD and exported dense and with experts by `fallow.export`, which
compares each with the training-time forward. Then both are timed in turns, so that a slow moment of the machine hits
both: `prefill` reads a prompt of `--prompt` tokens, `decode` adds one token at a time to 64 that are cached. A figure
is the median of all rounds. The obvious alternative, the engines' own benchmarks one after the other, compares two
moments. Cost: some minutes and `--folder` on disk (4 GB in fp32 at the default size).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fallow
from fallow import machine

RESULT = Path(__file__).resolve().parent / "results" / "ssd-export.json"
CACHED = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def built(args: argparse.Namespace, dtype: torch.dtype):
    """(stock model with random weights, its SSD handle with experts)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=args.width,
        intermediate_size=args.channels,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 128,
        num_key_value_heads=args.width // 128,
        hidden_act="relu",
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    handle = fallow.sparsify(model, fallow.SSD(experts=args.experts, active=args.active))
    handle.experts()
    return model, handle


def interleaved(pairs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, made in turns after one unmeasured turn."""
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    for n in range(rounds + 1):
        for name, call in pairs.items():
            start = time.perf_counter()
            call()
            if n:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


class Transformers:
    """A folder in stock transformers; `experts` is its experts_implementation."""

    def __init__(self, folder: Path, dtype: torch.dtype, experts: str | None = None) -> None:
        settings: dict[str, Any] = {"experts_implementation": experts} if experts else {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> None:
        self.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self, ids: list[int]) -> None:
        """The part after the first `CACHED` tokens, one at a time; the cache is made before and not counted."""
        for n in range(CACHED, len(ids)):
            step = self.model(input_ids=torch.tensor([[ids[n]]]), past_key_values=self.cache, use_cache=True)
            self.cache = step.past_key_values

    @torch.inference_mode()
    def ready(self, ids: list[int]) -> None:
        self.cache = self.model(input_ids=torch.tensor([ids[:CACHED]]), use_cache=True).past_key_values


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, folder: Path, prompt: int, threads: int) -> None:
        import llama_cpp

        (file,) = folder.glob("*.gguf")
        self.engine = llama_cpp.Llama(
            str(file),
            n_ctx=max(prompt, 256),
            n_batch=prompt,
            n_ubatch=prompt,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def prefill(self, ids: list[int]) -> None:
        self.engine.reset()
        self.engine.eval(ids)

    def ready(self, ids: list[int]) -> None:
        self.prefill(ids[:CACHED])

    def decode(self, ids: list[int]) -> None:
        for n in range(CACHED, len(ids)):
            self.engine.eval([ids[n]])


def measure(engines: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{phase: {engine: tokens per second}} of engines called in turns."""
    ids = torch.randint(8192, (args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    short = ids[: CACHED + args.decode]
    found: dict[str, dict[str, float]] = {}
    readers = {k: e for k, e in engines.items() if k != "batched_mm"}  # which copies the weights for every token
    taken = interleaved({k: lambda e=e: e.prefill(ids) for k, e in readers.items()}, args.rounds)
    found["prefill"] = {k: args.prompt / s for k, s in taken.items()}
    seconds: dict[str, list[float]] = {k: [] for k in engines}
    for n in range(args.rounds + 1):
        for k, e in engines.items():
            e.ready(short)
            start = time.perf_counter()
            e.decode(short)
            if n:
                seconds[k].append(time.perf_counter() - start)
    found["decode"] = {k: args.decode / statistics.median(s) for k, s in seconds.items()}
    return found


def rows_of(engine: str, dtype: str, found: dict[str, dict[str, float]], verified: dict[str, list[str]]) -> list[dict]:
    """One row for each phase and form with experts."""
    rows = []
    for phase, rates in found.items():
        dense = rates["dense"]
        for form, rate in rates.items():
            if form == "dense":
                continue
            row = {"engine": engine, "dtype": dtype, "phase": phase, "form": form, "threads": torch.get_num_threads()}
            row |= {"dense_tokens_per_s": dense, "moe_tokens_per_s": rate, "ratio": rate / dense}
            rows.append(row | {"verified": verified["moe"]})
            print(f"{engine:14}{dtype:6}{phase:9}{form:12}{dense:10.1f}{rate:10.1f}{rate / dense:7.2f}x", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--engines", nargs="+", default=["transformers", "llama.cpp"])
    parser.add_argument("--experts-implementations", nargs="+", default=["eager", "grouped_mm", "batched_mm"])
    parser.add_argument("--folder", type=Path, help="where exports go; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        for dtype in args.dtypes:
            rows += _of_dtype(args, dtype, Path(place))
    settings = {k: v for k, v in vars(args).items() if k not in ("folder", "output")}
    result = {"machine": machine.describe(), "versions": machine.versions(), "settings": settings, "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(args.output)


def _of_dtype(args: argparse.Namespace, dtype: str, place: Path) -> list[dict[str, Any]]:
    model, handle = built(args, DTYPES[dtype])
    folders = {name: place / f"{dtype}-{name}" for name in ("hf", "mixtral", "gguf-dense", "gguf-moe")}
    verified: dict[str, dict[str, list[str]]] = {"transformers": {}, "llama.cpp": {}}
    rows: list[dict[str, Any]] = []
    if "transformers" in args.engines:
        verified["transformers"] = {
            "dense": fallow.export(model, folders["hf"], to="hf").verified,
            "moe": fallow.export(model, folders["mixtral"], to="mixtral").verified,
        }
    gguf = "gguf" if dtype == "bf16" else "gguf_f32"
    if "llama.cpp" in args.engines:
        for name, mode in (("dense", "dense"), ("moe", "sparse")):
            with handle.in_mode(mode):
                verified["llama.cpp"][name] = fallow.export(model, folders[f"gguf-{name}"], to=gguf).verified
    for engine, told in verified.items():
        for name, lines in told.items():
            print(engine, dtype, name, "|", *lines, flush=True)
    del model, handle
    gc.collect()
    if "transformers" in args.engines:
        engines: dict[str, Any] = {"dense": Transformers(folders["hf"], DTYPES[dtype])}
        for kind in args.experts_implementations:
            engines[kind] = Transformers(folders["mixtral"], DTYPES[dtype], kind)
        rows += rows_of("transformers", dtype, measure(engines, args), verified["transformers"])
        del engines
        gc.collect()
    if "llama.cpp" in args.engines:
        pair = {k: LlamaCpp(folders[f"gguf-{k}"], args.prompt, args.threads) for k in ("dense", "moe")}
        stored = "f16" if gguf == "gguf" else "f32"
        rows += rows_of("llama.cpp", stored, measure(pair, args), verified["llama.cpp"])
    return rows


if __name__ == "__main__":
    main()
