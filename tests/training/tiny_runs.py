"""A tiny model folder, a tiny tokenizer and a few KB of text, so that whole runs take a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_model

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "finds",
    "small",
    "red",
    "old",
    "quick",
    "river",
    "house",
    "stone",
    "under",
    "over",
    "near",
    "and",
    "then",
    "it",
    "ran",
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB = 320


def text(seed: int, words: int) -> str:
    """Sentences of random words."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + (".\n" if i % 11 == 10 else " ") for i in range(words))


def tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level without merges: 256 bytes, then pad, eos and two role marks."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(bytes_)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "</s>", "<|user|>", "<|assistant|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    if chat:
        fast.chat_template = CHAT
    return fast


def model_folder(folder: Path, *, chat: bool = False, **overrides: Any) -> Path:
    """A saved tiny llama with its tokenizer."""
    model = tiny_model("llama", vocab_size=VOCAB, eos_token_id=257, pad_token_id=256, bos_token_id=None, **overrides)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return folder


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of eight quick steps; makes the model and the text where they are missing."""
    if not (root / "model").exists():
        model_folder(root / "model", chat=True)
        (root / "text.txt").write_text(text(0, 3000))
    base: dict[str, Any] = {
        "name": "tiny",
        "model": str(root / "model"),
        "train_data": [str(root / "text.txt")],
        "eval_fraction": 0.1,
        "seq_len": 64,
        "batch_size": 2,
        "steps": 8,
        "lr": 1e-3,
        "eval_tokens": 512,
        "log_every": 1,
        "precision": "fp32",
        "output": str(root / "runs"),
    }
    return base | changes
