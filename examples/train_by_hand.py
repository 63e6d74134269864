"""A training loop written by hand: fallow is the four lines marked (1) to (4).

    python examples/train_by_hand.py --model HuggingFaceTB/SmolLM2-135M --text notes.txt --out adapted

`--model` is a folder or a hub name of any causal language model whose family fallow knows; `--text` is one UTF-8 file.
The result is a plain Hugging Face model that `AutoModelForCausalLM.from_pretrained` loads without fallow.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fallow
from fallow.training import precision


def batches(ids_N: torch.Tensor, *, length: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless random windows of the text: int64 [batch, length], on the device of `ids_N`."""
    g = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids_N) - length + 1, (batch,), generator=g).tolist()
        yield torch.stack([ids_N[s : s + length] for s in starts])


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapt a language model to one text file, sparsely.")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--text", required=True, type=Path, help="a UTF-8 text file")
    parser.add_argument("--out", required=True, type=Path, help="folder for the adapted model")
    parser.add_argument("--omit", type=float, default=0.75, help="share of FFN channels omitted per step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, reason = precision.choose(device)
    print(f"{dtype} on {device}: {reason}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).train()
    ids_N = tokenizer(args.text.read_text(), return_tensors="pt").input_ids[0].to(device)
    if len(ids_N) < args.length:
        raise SystemExit(f"{args.text} has {len(ids_N)} tokens, fewer than --length {args.length}; lower --length")
    data = batches(ids_N, length=args.length, batch=args.batch, seed=0)

    sparsity = fallow.sparsify(model, fallow.SAT(omit=args.omit))  # (1) in place; the model keeps its parameter names
    optimizer = sparsity.optimizer(lr=args.lr, weight_decay=0.01)  # (2) AdamW, with fp32 masters for bf16 weights
    for step in range(args.steps):
        sparsity.before_step(step, args.steps)  # (3) the schedule, and which channels this step computes
        ids_BT = next(data)
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sparsity.after_step(step, args.steps)  # (4) bookkeeping
        if step % 10 == 0 or step == args.steps - 1:
            omitted = sparsity.metrics()["sat/omit_ffn"]
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}  omitted {omitted:.0%}")

    sparsity.remove().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved a plain Hugging Face model to {args.out}")


if __name__ == "__main__":
    main()
