"""Bytes that the page says a token reads, against the tensors that the kernels are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fallow import sparsify
from fallow.methods.upcycle import Upcycle
from fallow.methods.upcycle.predictors import rank_of
from fallow.report.upcycle_data import Upcycled
from tiny_models import tiny_batch, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"predictor": "linear", "rank": 8},
        {"predictor": "bilinear", "rank": 8},
        {"predictor": "quantized", "bits": 4, "group": 16},
        {"predictor": "quantized", "bits": 2, "group": 32},
        {"predictor": "quantized", "bits": 4, "group": 16, "compensation": 8},
    ],
)
def test_bytes_are_those_that_the_kernels_are_given(settings: dict[str, Any], dtype: torch.dtype) -> None:
    method = sparsify(tiny_model("llama", dtype=dtype), Upcycle(bank=16, keep=4, **settings))
    method.watch(tiny_batch())
    method.set_mode("sparse")
    layer = method.layers[0]
    w = layer.view.weights()
    packed = layer.predictor.packed(w)
    assert packed.tilt_F is not None
    held = sum(t.nbytes for t in packed.tensors) + packed.tilt_F.nbytes
    config = {"selection": "predictor", "bits": 4, "group": 64} | settings
    run = Upcycled(
        settings=config,
        bank=16,
        keep=[4, 4],
        width=32,
        channels=64,
        weight_bytes=w.w_up_FD.element_size(),
        dtype=str(dtype).removeprefix("torch."),
    )
    assert run.predictor == pytest.approx(held / (3 * w.w_up_FD.nbytes))
    if layer.predictor.compensation is not None:  # served in the model's dtype
        held += sum(p.to(dtype).nbytes for p in layer.predictor.compensation.parameters())
        assert "compensation" in run.parts
    assert run.reads == pytest.approx(0.25 + held / (3 * w.w_up_FD.nbytes))


def test_ranks_left_open_are_those_of_the_method() -> None:
    for kind in ("linear", "bilinear"):
        for width in (8, 64, 576, 896, 2048, 3584, 8192):
            run = Upcycled(
                settings={"predictor": kind}, bank=64, keep=[16], width=width, channels=width, weight_bytes=2, dtype=""
            )
            assert run.rank == rank_of(Upcycle(predictor=kind), width)
