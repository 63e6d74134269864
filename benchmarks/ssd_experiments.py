"""SSD's real experiments: small ReGLU models from scratch, dense, switching, and native MoE, several seeds.

    python benchmarks/ssd_experiments.py main deep ablations --seeds 0 1   # two of these side by side share the work
    python benchmarks/ssd_experiments.py collate                           # benchmarks/results/ssd-pretrain.json

Runs are named ARM-sSEED; a finished one is skipped, and one that another process has begun is left to it. All arms of a
seed see the same rows in the same order; all but `moe` and `small` start from the same weights. Precision is what
`fallow train` would choose on this machine, for all arms alike. Seconds are not compared across runs: a record counts
its dense and sparse steps, observations and partitions, and benchmarks/ssd_pace.py times these side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scratch_runs import batches, claimed, gathered, lr_factor, optimizer_of
from ssd_arms import ACTIVE, ARMS, EXPERTS, MODELS, SETS, Arm
from transformers import MixtralConfig, MixtralForCausalLM

import fallow
from fallow import machine
from fallow.errors import FallowError
from fallow.ops import attention
from fallow.ops.cross_entropy import causal_lm_loss
from fallow.training import data, heldout, precision, scratch
from fallow.training.recipe import Recipe
from fallow.training.settings import load_file, resolve
from fallow.training.trainer import collate

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "benchmarks" / "recipes" / "ssd-pretrain.yaml"
RESULT = ROOT / "benchmarks" / "results" / "ssd-pretrain.json"
CURVE = 40
"""Steps between two points of the held-out curve."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed or interrupted, 2 asked wrongly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=[*SETS, "collate"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these arms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--output", default=os.path.relpath(ROOT / "runs" / "experiments" / "ssd-pretrain"))
    options = parser.parse_args(argv)
    folder = Path(options.output)
    try:
        if options.what == ["collate"]:
            gathered(folder, "ssd-pretrain", dataclasses.asdict(resolve(load_file(RECIPE), {})), RESULT)
            print(f"wrote {RESULT.relative_to(ROOT)}")
            return 0
        torch.set_num_threads(options.threads)
        os.chdir(ROOT)  # the recipe's data is named from here
        recipe = resolve(load_file(RECIPE), {"steps": options.steps} if options.steps else {})
        folder.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for arm in (a for what in options.what for a in SETS.get(what, ())):
                if not options.arms or arm.name in options.arms:
                    claimed(folder, f"{arm.name}-s{seed}", partial(train, recipe, arm, seed))
        return 0
    except FallowError as error:
        print(f"ssd_experiments: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ssd_experiments: interrupted; the same command goes on from here", file=sys.stderr)
        return 1


def begin(recipe: Recipe, arm: Arm, seed: int) -> tuple[Recipe, scratch.Start, Any, Any]:
    """(the arm's recipe, start, prepared text, handle or None)."""
    shape = recipe.architecture | MODELS[arm.model]
    shape["intermediate_size"] = round(shape["intermediate_size"] * arm.ffn_share)
    recipe = dataclasses.replace(recipe, seed=seed, architecture=shape, steps=round(recipe.steps * arm.steps_scale))
    dtype = precision.choose(torch.device("cpu")).dtype
    start = scratch.start(recipe, dtype)
    if arm.native_moe:
        start = dataclasses.replace(start, model=native_moe(start.model.config, seed).to(dtype).train())
    start.model.loss_function = causal_lm_loss  # type: ignore[assignment]
    attention.enable(start.model)
    text = data.prepare(recipe, start.tokenizer, start.model.config.vocab_size)
    handle = fallow.sparsify(start.model, fallow.SSD(seed=seed, **arm.ssd)) if arm.ssd is not None else None
    if handle is not None:
        handle.watch(collate([text.evaluation[i] for i in range(-8, 0)]))
    return recipe, start, text, handle


def native_moe(dense: Any, seed: int) -> MixtralForCausalLM:
    """A Mixtral whose experts together are the dense FFN, so that k of E cost what SSD's k of E cost."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size // EXPERTS,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        num_local_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        hidden_act=dense.hidden_act,
        vocab_size=dense.vocab_size,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dense.rope_parameters,
        tie_word_embeddings=True,
        output_router_logits=False,
        use_cache=False,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
    )
    return MixtralForCausalLM(config)


def train(recipe: Recipe, arm: Arm, seed: int) -> dict[str, Any]:
    """One run; returns its record."""
    recipe, start, text, handle = begin(recipe, arm, seed)
    model = start.model
    optimizer = optimizer_of(model, handle, recipe, matrix_scale=arm.matrix_lr)
    warm = max(1, round(recipe.warmup * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, warm, recipe.steps))
    losses: list[float] = []
    curve: list[tuple[int, float]] = []
    sparse_steps, seconds = 0, 0.0

    def held(mode: str, tokens: int) -> float:
        found = heldout.loss(
            model,
            text.evaluation,
            tokens=tokens,
            batch_size=recipe.batch_size,
            sparsity=handle,
            mode=mode,  # type: ignore[arg-type]
            stopped=lambda: False,
        )
        assert found is not None
        return found

    for step, batch in enumerate(batches(text.train, recipe)):
        began = time.thread_time()
        if handle is not None:
            handle.before_step(step, recipe.steps)
            sparse_steps += handle.metrics()["ssd/active_share"] < 1
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if handle is not None:
            handle.after_step(step, recipe.steps)
        seconds += time.thread_time() - began
        losses.append(float(loss.detach()))
        if (step + 1) % CURVE == 0 and step + 1 < recipe.steps:
            curve.append((step + 1, round(held("dense", 8192), 5)))
    insight = handle.insight() if handle is not None else {}
    return {
        "arm": arm.name,
        "seed": seed,
        "settings": arm.ssd,
        "steps": recipe.steps,
        "sparse_steps": sparse_steps,
        "tokens": recipe.steps * recipe.tokens_per_step(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "heldout": held("dense", recipe.eval_tokens),
        "heldout_sparse": held("sparse", recipe.eval_tokens) if handle is not None else None,
        "curve": curve,
        "seconds": round(seconds, 2),
        "losses": [round(x, 4) for x in losses],
        "insight": insight,
        "threads": torch.get_num_threads(),
        "machine": machine.describe(),
    }


if __name__ == "__main__":
    sys.exit(main())
