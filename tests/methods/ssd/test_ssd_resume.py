"""Cut at any step and resumed from files equals never cut, bit for bit; state that does not fit is refused whole."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.ssd.steps import SWITCHING, evaluated, made, phases, train

from fallow.errors import CheckpointError
from fallow.methods.ssd import switching
from fallow.training.callback import load_state, save_state

TOTAL = 30
SETTINGS: dict[str, Any] = SWITCHING | {"max_gap": 0.5}


def save(model: Any, handle: Any, optimizer: Any, folder: Path) -> None:
    folder.mkdir()
    torch.save([model.state_dict(), optimizer.state_dict()], folder / "rest.pt")
    save_state(handle, folder)


def resumed(folder: Path, dtype: torch.dtype, *, optimizer_first: bool) -> tuple[Any, Any, Any]:
    model, handle = made(dtype=dtype, watch=False, **SETTINGS)
    weights, moments = torch.load(folder / "rest.pt")
    if optimizer_first:  # as transformers' Trainer does it
        optimizer = handle.optimizer(lr=1e-2, weight_decay=0.1)
        optimizer.load_state_dict(moments)
    model.load_state_dict(weights)
    load_state(handle, folder)
    if not optimizer_first:
        optimizer = handle.optimizer(lr=1e-2, weight_decay=0.1)
        optimizer.load_state_dict(moments)
    return model, handle, optimizer


def everything(model: Any, handle: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    found = dict(model.state_dict())
    found |= {k: v for k, v in handle.state_dict().items() if torch.is_tensor(v)}
    for key, state in optimizer.state_dict()["state"].items():
        found |= {f"{key}.{name}": torch.as_tensor(v) for name, v in state.items()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bit_exact_from_files_across_switches(dtype, tmp_path):
    cuts = (1, 4, 8, 10, 12, 13, 19, 25)
    model, handle = made(dtype=dtype, **SETTINGS)
    optimizer = handle.optimizer(lr=1e-2, weight_decay=0.1)
    losses: list[float] = []
    for first, last in zip((0, *cuts), (*cuts, TOTAL), strict=True):
        losses += train(model, handle, optimizer, first, last, TOTAL)
        if last < TOTAL:
            save(model, handle, optimizer, tmp_path / str(last))
    assert phases(handle).startswith("ddd" + "ssssss" + "ddd" + "ssssss") and phases(handle).endswith("mmmmmm")
    assert sum(e.repartition for e in handle.log) >= 2
    want = everything(model, handle, optimizer)
    for n, cut in enumerate(cuts):
        again = resumed(tmp_path / str(cut), dtype, optimizer_first=bool(n % 2))
        assert train(*again, cut, TOTAL, TOTAL) == losses[cut:], cut
        found = everything(*again)
        assert found.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(value, found[name]), (cut, name)
        assert again[1].log == handle.log and again[1].insight() == handle.insight()
        assert switching.replay(again[1].config, again[1].log) == handle.log


def test_the_saved_state_serves_a_trained_model(tmp_path):
    """The state beside the final weights is enough to compute them sparse, as the run did."""
    model, handle = made(**SETTINGS)
    train(model, handle, handle.optimizer(lr=1e-2), 0, TOTAL, TOTAL)
    with handle.in_mode("sparse"):
        want = evaluated(model)
    weights = copy.deepcopy(handle.remove().state_dict())
    save_state(handle, tmp_path)
    other, again = made(watch=False, **SETTINGS)
    other.load_state_dict(weights)
    load_state(again, tmp_path)
    again.set_mode("sparse")
    assert torch.equal(evaluated(other), want)
    scalars = json.loads((tmp_path / "sparsity.json").read_text())
    assert scalars["method"] == "ssd" and len(json.loads(scalars["history"])["log"]) == TOTAL


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"experts": 8}, "8 experts of 64 channels, the config 4 of 64"),
        ({"ids.0": torch.arange(128)}, "4 experts of 128 channels, the config 4 of 64"),
        ({"method": "sat"}, "'sat' with 2 layers, not of 'ssd' with 2 layers"),
        ({"n_layers": 3}, "'ssd' with 3 layers"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(change, match):
    model, handle = made(**SETTINGS)
    optimizer = handle.optimizer(lr=1e-2)
    train(model, handle, optimizer, 0, 12, TOTAL)
    other_model, other = made(**SETTINGS)
    train(other_model, other, other.optimizer(lr=1e-2), 0, 6, TOTAL)
    before = copy.deepcopy((everything(model, handle, optimizer), handle.log))
    with pytest.raises(CheckpointError, match=match) as caught:
        handle.load_state_dict(other.state_dict() | change)
    assert "\n" not in str(caught.value)
    now = everything(model, handle, optimizer)
    assert now.keys() == before[0].keys() and all(torch.equal(v, now[k]) for k, v in before[0].items())
    assert handle.log == before[1]
