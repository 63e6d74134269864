"""What ReLU-fication costs a trained SwiGLU model: swap, continual training, and what its experts lose then.

    python benchmarks/ssd_relufy.py          # benchmarks/results/ssd-relufy.json

SmolLM2-135M-Instruct on technical English: as it is; with ReLU in the place of SiLU and no training; both trained on
for equal tokens, so that the new text is not counted as a cost of ReLU. Loss by a quarter of the experts (made from
the activations, no sparse training) is beside each ReLU form. Cost: about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scratch_runs import batches, lr_factor

import fallow
from fallow import machine
from fallow.ops import attention
from fallow.ops.cross_entropy import causal_lm_loss
from fallow.optim import adamw_for
from fallow.training import data, heldout, models, precision
from fallow.training.recipe import Recipe
from fallow.training.trainer import collate

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "ssd-relufy.json"
DATA = Path("../shared/data")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-4)
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    recipe = Recipe(
        model=models.SMOLLM2,
        train_data=[str(DATA / "technical-english-train.txt")],
        eval_data=[str(DATA / "technical-english-eval.txt")],
        steps=options.steps,
        batch_size=4,
        seq_len=512,
        lr=options.lr,
        eval_tokens=8192,
    )
    rows = [row for relu in (False, True) for row in arm(recipe, relu=relu)]
    result = {"experiment": "ssd-relufy", "command": "python benchmarks/ssd_relufy.py"}
    result |= {"machine": machine.describe(), "steps": options.steps, "lr": options.lr, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def arm(recipe: Recipe, *, relu: bool) -> list[dict[str, Any]]:
    """The model before and after training, with or without the swap."""
    dtype = precision.choose(torch.device("cpu")).dtype
    model, tokenizer = models.load(recipe.model, None, dtype)
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    attention.enable(model)
    text = data.prepare(recipe, tokenizer, model.config.vocab_size)
    handle: Any = None
    if relu:
        handle = fallow.sparsify(model, fallow.SSD(experts=16, active=4, schedule="always_sparse", relu="swap"))
        handle.watch(collate([text.evaluation[i] for i in range(4)]))

    def row(tokens: int) -> dict[str, Any]:
        name = ("relu" if relu else "silu") + (", trained" if tokens else ", as it is" if not relu else ", swapped")
        found = {"arm": name, "tokens": tokens, "loss": held(model, text, recipe, handle, "dense")}
        found |= {"zeros": None, "sparse_loss": None}
        if handle is not None:
            handle.partition(tokens)
            found |= {"zeros": handle.observe(tokens).zeros, "sparse_loss": held(model, text, recipe, handle, "sparse")}
        print(found, flush=True)
        return found

    rows = [row(0)]
    optimizer = adamw_for(model, lr=recipe.lr) if handle is None else handle.optimizer(lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, 5, recipe.steps))
    for batch in batches(text.train, recipe):
        model(**batch, use_cache=False).loss.backward()  # dense: no step is announced to the method
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return [*rows, row(recipe.steps * recipe.tokens_per_step())]


def held(model: Any, text: Any, recipe: Recipe, handle: Any, mode: Any) -> float:
    found = heldout.loss(model, text.evaluation, tokens=recipe.eval_tokens, batch_size=4, sparsity=handle, mode=mode)
    assert found is not None
    return found


if __name__ == "__main__":
    sys.exit(main())
