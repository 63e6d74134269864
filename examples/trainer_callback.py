"""The same with `transformers.Trainer`: give it the method's optimizer and one callback. trl's SFTTrainer takes both.

    python examples/trainer_callback.py --model HuggingFaceTB/SmolLM2-135M --text notes.txt --out adapted

The weights are loaded in the training dtype and autocast stays off: casting fp32 weights at every use is the slowest
way to train in bf16 on CPU. The optimizer keeps the fp32 masters instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fallow
from fallow.training import precision


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapt a language model to one text file with transformers.Trainer.")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--text", required=True, type=Path, help="a UTF-8 text file")
    parser.add_argument("--out", required=True, type=Path, help="folder for checkpoints and the adapted model")
    parser.add_argument("--omit", type=float, default=0.75, help="share of FFN channels omitted per step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=precision.choose(device).dtype).to(device)
    ids = tokenizer(args.text.read_text()).input_ids
    windows = [ids[i : i + args.length] for i in range(0, len(ids) - args.length + 1, args.length)]
    if not windows:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, fewer than --length {args.length}; lower --length")

    sparsity = fallow.sparsify(model, fallow.SAT(omit=args.omit))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"input_ids": windows, "labels": windows}),
        optimizers=(sparsity.optimizer(lr=args.lr, weight_decay=0.01), None),
        callbacks=[fallow.SparsityCallback(sparsity)],
    )
    trainer.train()
    sparsity.remove().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved a plain Hugging Face model to {args.out}")


if __name__ == "__main__":
    main()
