"""Tiny upcycled models, and their loss on tiny batches."""

from __future__ import annotations

from tests.tiny_models import tiny_batch, tiny_model

import fallow

SMALL = {"bank": 16, "keep": 4, "group": 16}


def upcycled(family="llama", **settings):
    model = tiny_model(family)
    return model, fallow.sparsify(model, fallow.Upcycle(**(SMALL | settings)))


def loss_of(model, seed=0):
    return model(**tiny_batch(seed=seed)).loss
