"""Tiny upcycled models, their exported folders, and what is asked of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tests.tiny_models import tiny_batch, tiny_model
from transformers import AutoModelForCausalLM

import fallow
from fallow import Upcycle
from fallow.exporting.agreement import probe

SMALL = {"bank": 16, "keep": 4}


def made(family="llama", dtype=torch.float32, *, model=None, **settings):
    model = tiny_model(family, dtype=dtype, **(model or {}))
    handle = fallow.sparsify(model, Upcycle(**(SMALL | {"predictor": "bilinear", "rank": 16} | settings)))
    handle.watch(tiny_batch(seed=3, batch=4, tokens=32))
    handle.set_mode("sparse")
    return model.eval(), handle


def load(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model, mode="sparse", tokens=64) -> torch.Tensor:
    with model._fallow.in_mode(mode):
        return model(input_ids=probe(128)[:, :tokens], use_cache=False).logits


def edit(file: Path, change) -> None:
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
