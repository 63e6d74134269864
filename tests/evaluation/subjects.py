"""A tiny sparse model as a finished run's folder, and as a subject in memory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import fallow
from fallow.evaluation.subject import Subject
from fallow.training.callback import save_state
from tests.tiny_models import tiny_model
from tests.training.tiny_runs import text

VOCAB = 2000
SETTINGS: dict[str, Any] = {"bank": 16, "keep": 4, "predictor": "bilinear", "rank": 24}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of Python's own reference: about four characters a token, so that RULER fits short contexts."""
    pages = [topics[name] for name in sorted(topics)]
    pages += [
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\nVAR AB = VAR CD "
    ] * 50
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        pages,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def subject(*, layers: int = 2, context: int = 4096, act: str = "silu", down: float = 1.0, **settings: Any) -> Subject:
    """An upcycled tiny llama in fp32 with a small tokenizer, its predictors started from text. `down` multiplies the
    down projections, half as much again in every further layer, so that FFNs matter, and about equally."""
    model = tiny_model(
        "llama",
        vocab_size=VOCAB,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        num_hidden_layers=layers,
        max_position_embeddings=context,
        hidden_act=act,
        dtype=torch.float32,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name and down != 1:
                parameter.mul_(down * 1.5 ** int(name.split(".")[2]))
    handle = fallow.sparsify(model, fallow.Upcycle(**SETTINGS | settings))
    made = Subject(name="tiny", model=model.eval(), tokenizer=tokenizer(), sparsity=handle)
    ids = torch.tensor(made.tokenizer(text(5, 2000)).input_ids[:1024])
    handle.watch({"input_ids": ids.view(4, 256)})
    handle.set_mode("sparse")
    return made


def run_folder(folder: Path, made: Subject, **settings: Any) -> Path:
    """`made` as a finished run lies on disk."""
    (folder / "model").mkdir(parents=True)
    recipe = {"method": "upcycle", "method_settings": SETTINGS | settings, "model": "tiny"}
    (folder / "run.json").write_text(json.dumps({"status": "finished", "recipe": recipe}))
    made.model.save_pretrained(folder / "model")
    made.tokenizer.save_pretrained(folder / "model")
    assert made.sparsity is not None
    save_state(made.sparsity, folder / "model")
    return folder
