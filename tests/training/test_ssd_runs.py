"""Whole runs with experts, from scratch: what they leave behind, killed and resumed, and refused."""

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
from fallow.cli.train import train_command
from fallow.errors import ConfigError
from fallow.methods.ssd import switching
from fallow.training import checkpoint, data, heldout
from fallow.training.callback import load_state
from fallow.training.progress import Display
from fallow.training.run import run
from fallow.training.settings import resolve
from tests.training.test_resume import finish, start, wait_for_step, write
from tests.training.tiny_runs import settings

TINY = {
    "model_type": "llama",
    "hidden_act": "relu",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SSD = {
    "method": "ssd",
    "experts": 8,
    "active": 2,
    "monitor_every": 2,
    "similarity": 0.3,
    "zeros": 0.3,
    "patience": 1,
    "max_gap": 10.0,
    "end_share": 0.2,
}


def ssd(root: Path, **changes: Any) -> dict[str, Any]:
    return settings(root, architecture=TINY, tokenizer_vocab=300, steps=40, lr=1e-2) | SSD | changes


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").open()) if e["kind"] == kind]


def test_a_run_from_scratch_leaves_both_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command([str(write(tmp_path / "r.yaml", ssd(tmp_path))), "--json"]) == 0
    shown = capsys.readouterr()
    assert "computed sparse" in shown.err
    folder = tmp_path / "runs/tiny/ssd"
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["backends"]["expert_ffn"] in ("cpu", "naive")

    before, after = record["eval"]["before"], record["eval"]["after"]
    assert after["loss"] < before["loss"] - 1 and "sparse_loss" not in before
    assert after["loss"] != after["sparse_loss"] == pytest.approx(after["loss"], abs=1.0)
    insight = record["insight"]
    told = [switching.Entry.of(line) for line in insight["log"]]
    config = resolve(ssd(tmp_path), {}).method_config()
    assert isinstance(config, fallow.SSD) and switching.replay(config, told) == told
    assert {"dense", "sparse", "mixed"} == {e.phase for e in told} and told[-1].phase == "mixed"
    assert [e.step for e in told] == list(range(0, 40, 2))
    assert (insight["experts"], insight["active"]) == (8, [2, 2])
    assert [p["step"] for p in insight["partitions"]] == [e.step for e in told if e.repartition]
    for facts in insight["partitions"]:
        for recall, oracle in zip(facts["recall"], facts["oracle"], strict=True):
            assert 0 < recall <= oracle <= 1
        assert all(0 <= x <= 1 for x in (*facts["noise_floor"], *facts.get("overlap", [])))
    for seen in insight["observations"]:
        assert all(0 <= v <= 1 for v in (*seen["zeros"], *seen["dead"]))
    assert 0.3 < insight["observations"][0]["zeros"][0] < 0.7, "half of a random model's neurons are off"

    logged = lines(folder, "train")
    assert {line["ssd/active_share"] for line in logged} == {0.25, 1.0}
    assert logged[-1]["ssd/zeros"] == told[-1].seen.zeros
    assert set(lines(folder, "layers")[-1]) >= {"zeros", "dead", "similarity", "recall"}

    assert {"sparsity.json", "sparsity.safetensors", "config.json"} <= {p.name for p in (folder / "model").iterdir()}
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.hidden_act == "relu"
    handle: Any = fallow.sparsify(model, config)
    load_state(handle, folder / "model")
    recipe, tokenizer = resolve(ssd(tmp_path), {}), AutoTokenizer.from_pretrained(folder / "model")
    rows = data.prepare(recipe, tokenizer, model.config.vocab_size).evaluation
    for mode, want in (("dense", after["loss"]), ("sparse", after["sparse_loss"])):
        found = heldout.loss(model, rows, tokens=512, batch_size=2, sparsity=handle, mode=mode)
        assert found == pytest.approx(want, rel=1e-5), "the folder holds what was measured"


def test_killed_and_resumed_equals_never_killed(tmp_path: Path) -> None:
    """Weights, partitions, routers and moments bit for bit, with the same observations and the same switches."""
    common = ssd(tmp_path, steps=60, save_every=4, precision="bf16", batch_size=1, accumulate=2)
    run(resolve(common | {"name": "whole"}, {}), display=Display(silent=True))
    cut = write(tmp_path / "cut.yaml", common | {"name": "cut"})
    process = start(cut)
    wait_for_step(tmp_path / "runs/cut/ssd/metrics.jsonl", random.randint(5, 50), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "runs/cut/ssd/run.json").read_text())["status"] == "running"
    assert "resuming   from checkpoint-" in finish(cut)
    whole, again = (tmp_path / "runs" / name / "ssd" for name in ("whole", "cut"))
    last = max((whole / "checkpoints").glob("checkpoint-*"), key=checkpoint.step_of).name
    at_end = f"checkpoints/{last}"
    for file in ("model/model", "model/sparsity", f"{at_end}/model", f"{at_end}/sparsity"):
        expected, found = (load_file(r / f"{file}.safetensors") for r in (whole, again))
        assert expected.keys() == found.keys()
        for name, weight in expected.items():
            assert torch.equal(weight, found[name]), (file, name)
    assert not torch.equal(expected["ids.0"], torch.arange(128)), "neurons were sorted"
    states = [torch.load(r / at_end / "optimizer.pt")["state"] for r in (whole, again)]
    for key, state in states[0].items():
        assert state.keys() == states[1][key].keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])), (key, name)
    records = [json.loads((r / "run.json").read_text()) for r in (whole, again)]
    assert records[0]["insight"] == records[1]["insight"] and records[0]["eval"] == records[1]["eval"]
    switches = [e for e in records[0]["insight"]["log"] if e["before"] != e["phase"]]
    assert len(switches) >= 3
    for kind in ("train", "eval", "layers"):
        for what in ("step", "loss", "sparse_loss", "ssd/active_share", "ssd/similarity", "zeros"):
            expected, found = ([e.get(what) for e in lines(r, kind)] for r in (whole, again))
            assert expected == found, (kind, what)


def test_a_smooth_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = ssd(tmp_path, architecture=TINY | {"hidden_act": "silu"})
    with pytest.raises(ConfigError, match="relu='swap'") as caught:
        run(resolve(recipe, {}), display=Display(silent=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs/tiny/ssd/run.json").exists()
    record = run(resolve(recipe | {"relu": "swap", "steps": 4}, {}), display=Display(silent=True))
    assert record["status"] == "finished"
    config = json.loads((tmp_path / "runs/tiny/ssd/model/config.json").read_text())
    assert config["hidden_act"] == "relu"


def test_a_dense_control_can_be_served_sparse_too(tmp_path: Path) -> None:
    """Experts are made of the trained weights at the end: the dense loss is that of a run without a method."""
    control = run(resolve(ssd(tmp_path, schedule="always_dense", steps=8), {}), display=Display(silent=True))
    plain = run(
        resolve(settings(tmp_path, architecture=TINY, tokenizer_vocab=300, lr=1e-2), {}), display=Display(silent=True)
    )
    losses = [e["loss"] for e in lines(tmp_path / "runs/tiny/ssd", "train")]
    assert losses == [e["loss"] for e in lines(tmp_path / "runs/tiny/dense", "train")]
    assert control["eval"]["after"]["loss"] == plain["eval"]["after"]["loss"] != control["eval"]["after"]["sparse_loss"]
    state = load_file(tmp_path / "runs/tiny/ssd/model/sparsity.safetensors")
    assert not torch.equal(state["ids.0"], torch.arange(128)) and state["router.0"].any()
