"""What the benchmarks of gpu_all.py share: settings, timing by CUDA events, the shapes and the dense forms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fallow.bench.harness import Timing
    from fallow.bench.steps import Case

Row = dict[str, Any]
Step = Callable[[], object]
SEQUENCES, SEQ_LEN = 4, 2048


@dataclass(kw_only=True, slots=True, frozen=True)
class Settings:
    rounds: int = 30
    """Timed rounds per case; each runs every form once."""
    warm_up: int = 5
    """Untimed rounds, after compilation."""
    max_autotune: bool = True
    """Also time dense compiled with mode="max-autotune-no-cudagraphs"."""
    device: str = "cuda"
    """Where tensors live."""
    part: str | None = None
    """Of a bench that has parts: the only one to run."""

    def of(self, *, rounds: int, warm_up: int) -> Settings:
        """The same with other rounds."""
        return replace(self, rounds=rounds, warm_up=warm_up)


@contextmanager
def stopwatch(what: str) -> Iterator[None]:
    """Print how long something took, however it ended."""
    began = time.perf_counter()
    try:
        yield
    finally:
        print(f"  [{what}: {time.perf_counter() - began:.1f} s]", flush=True)


def interleave(forms: dict[str, Step], settings: Settings) -> Timing:
    """`fallow.bench.harness.interleave` with CUDA events: device time of each form, in alternating order."""
    from fallow.bench import harness
    from fallow.bench.harness import Timing

    if settings.device == "cpu":
        return harness.interleave(forms, rounds=settings.rounds, warm_up=settings.warm_up)
    import torch

    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in forms}
    for i in range(settings.warm_up + settings.rounds):
        for name in forms if i % 2 == 0 else reversed(list(forms)):
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            forms[name]()
            pair[1].record()
            if i >= settings.warm_up:
                events[name].append(pair)
        torch.cuda.synchronize()
    return Timing({name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()})


def graphed(step: Step) -> Step:
    """The step as a CUDA graph: without Python's time. Compiling and tuning come first."""
    from fallow.serving.layered import captured

    return captured(step)


def case_named(name: str) -> Case:
    """A case of `fallow.bench.steps` with this benchmark's tokens."""
    from fallow.bench.steps import CASES

    return replace(CASES[name], sequences=SEQUENCES, seq_len=SEQ_LEN)


def compile_options(settings: Settings) -> dict[str, dict[str, Any]]:
    """Dense forms: name -> options of torch.compile, empty for eager."""
    forms: dict[str, dict[str, Any]] = {"dense/eager": {}, "dense/compiled": {"dynamic": False}}
    if settings.max_autotune:
        forms["dense/max-autotune"] = {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}
    return forms


def fused_products(graph: Any, inputs: Any) -> Any:
    """A backend of torch.compile: Inductor, with products of a single row as sums that it fuses and tunes, in place of
    cuBLAS's. (Inductor does that itself where it tunes by coordinate descent, which takes minutes for a layer.)"""
    import torch
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    def product(a: torch.Tensor, b: torch.Tensor) -> Any:
        return (a.unsqueeze(2) * b.unsqueeze(0)).sum(dim=1) if a.shape[0] == 1 else NotImplemented

    table = {**select_decomp_table(), torch.ops.aten.mm.default: product}
    return compile_fx(graph, inputs, decompositions=table, config_patches={"max_autotune_pointwise": True})
