"""Whole upcycling runs: both stages, what they leave behind, killed and resumed, longer contexts, and refused."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fallow
from fallow.errors import ConfigError
from fallow.training import checkpoint, data, heldout
from fallow.training.callback import load_state
from fallow.training.progress import Display
from fallow.training.run import run
from fallow.training.settings import resolve
from tests.training.test_resume import finish, start, wait_for_step, write
from tests.training.tiny_runs import settings

UPCYCLE = {
    "method": "upcycle",
    "bank": 16,
    "keep": 4,
    "predictor": "bilinear",
    "rank": 8,
    "fit_tokens": 2048,
    "distill": 0.5,
    "predictor_loss": 0.1,
    "compensation": 4,
    "monitor_every": 0.25,
}


def upcycle(root: Path, **changes: Any) -> dict[str, Any]:
    return settings(root) | UPCYCLE | changes


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").open()) if e["kind"] == kind]


def test_a_run_fits_then_trains_and_leaves_what_was_measured(tmp_path: Path) -> None:
    record = run(resolve(upcycle(tmp_path, steps=24, eval_every=12), {}), display=Display(silent=True))
    folder = tmp_path / "runs/tiny/upcycle"
    assert record["status"] == "finished"
    before, after = record["eval"]["before"], record["eval"]["after"]
    assert before["sparse_loss"] != before["loss"], "both modes before training too"
    assert after["sparse_loss"] < before["sparse_loss"] - 0.5
    assert [e["step"] for e in lines(folder, "eval")] == [0, 12, 24]
    assert all("sparse_loss" in e for e in lines(folder, "eval"))

    fitted = lines(folder, "prepare")
    assert fitted[-1]["tokens"] >= 2048
    assert all(len(e["recall"]) == 2 for e in fitted)
    insight = record["insight"]
    assert insight["keep"] == [4, 4]
    assert insight["fits"] == [{k: v for k, v in e.items() if k != "kind"} for e in fitted]
    assert [look["step"] for look in insight["looks"]] == [0, 6, 12, 18, 24]
    for look in insight["looks"]:
        assert all(0 < r <= 1 for r in (*look["recall"], *look["random"]))
        assert look["selected"] == pytest.approx([0.25, 0.25])

    logged = lines(folder, "train")
    assert logged[0]["upcycle/keep_share"] == 0.25
    assert 0 < logged[-1]["upcycle/recall"] <= 1
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    recipe = resolve(upcycle(tmp_path), {})
    config: Any = recipe.method_config()
    handle: Any = fallow.sparsify(model, config)
    load_state(handle, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = data.prepare(recipe, tokenizer, model.config.vocab_size).evaluation
    for mode, want in (("dense", after["loss"]), ("sparse", after["sparse_loss"])):
        found = heldout.loss(model, rows, tokens=512, batch_size=2, sparsity=handle, mode=mode)
        assert found == pytest.approx(want, rel=1e-5), "the folder holds what was measured"


@pytest.mark.parametrize("predictor", ["bilinear", "quantized"])
def test_killed_and_resumed_equals_never_killed(tmp_path: Path, predictor: str) -> None:
    """Weights, predictors and moments bit for bit, with the same looks and losses."""
    changes = (
        {"rank": None, "fit_tokens": 0, "anneal": 0.5, "compensation": 0, "group": 16}
        if predictor == "quantized"
        else {}
    )
    common = upcycle(tmp_path, steps=40, save_every=4, precision="bf16", predictor=predictor, accumulate=2, **changes)
    common |= {"batch_size": 1}
    run(resolve(common | {"name": "whole"}, {}), display=Display(silent=True))
    cut = write(tmp_path / "cut.yaml", common | {"name": "cut"})
    process = start(cut)
    wait_for_step(tmp_path / "runs/cut/upcycle/metrics.jsonl", random.randint(5, 30), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "resuming   from checkpoint-" in finish(cut)
    whole, again = (tmp_path / "runs" / name / "upcycle" for name in ("whole", "cut"))
    last = max((whole / "checkpoints").glob("checkpoint-*"), key=checkpoint.step_of).name
    at_end = f"checkpoints/{last}"
    for file in ("model/model", "model/sparsity", f"{at_end}/model", f"{at_end}/sparsity"):
        expected, found = (load_file(r / f"{file}.safetensors") for r in (whole, again))
        assert expected.keys() == found.keys()
        for name, weight in expected.items():
            assert torch.equal(weight, found[name]), (file, name)
    states = [torch.load(r / at_end / "optimizer.pt")["state"] for r in (whole, again)]
    for key, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])), (key, name)
    records = [json.loads((r / "run.json").read_text()) for r in (whole, again)]
    assert records[0]["insight"] == records[1]["insight"] and records[0]["eval"] == records[1]["eval"]
    for what in ("step", "loss", "upcycle/keep_share", "upcycle/recall"):
        expected, found = ([e.get(what) for e in lines(r, "train")] for r in (whole, again))
        assert expected == found, what


def test_contexts_beyond_the_models_own_need_its_config_changed(tmp_path: Path) -> None:
    long = upcycle(tmp_path, seq_len=256, steps=1, batch_size=1, fit_tokens=0, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="beyond the 128 positions"):
        run(resolve(long, {}), display=Display(silent=True))
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    extended = long | {"config_changes": {"max_position_embeddings": 256, "rope_parameters": rope}}
    assert run(resolve(extended, {}), display=Display(silent=True))["status"] == "finished"
    config = json.loads((tmp_path / "runs/tiny/upcycle/model/config.json").read_text())
    assert config["max_position_embeddings"] == 256
    assert config["rope_parameters"]["rope_type"] == "yarn"
    with pytest.raises(ConfigError, match="no 'max_positions'"):
        run(resolve(long | {"config_changes": {"max_positions": 1}, "name": "typo"}, {}), display=Display(silent=True))


def test_a_bank_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        run(resolve(upcycle(tmp_path, bank=24, keep=6), {}), display=Display(silent=True))
    assert not (tmp_path / "runs/tiny/upcycle/run.json").exists()
