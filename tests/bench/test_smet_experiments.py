"""SMET's experiments: arms are what their names say, runs are functions of their seed, what is read out is right."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fallow

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scratch_runs  # noqa: E402
import smet_arms as arms  # noqa: E402
import smet_collate as collated  # noqa: E402
import smet_experiments as experiments  # noqa: E402
import smet_figures as figures  # noqa: E402

from fallow.training.settings import load_file, resolve  # noqa: E402


def model_of(widths):
    recipe = resolve(load_file(experiments.RECIPE), {})
    shape = {k: v for k, v in (recipe.architecture | widths).items() if k != "model_type"}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=recipe.tokenizer_vocab, **shape))


def state_bytes(arm):
    """Of a whole model after one step and one update of the topology."""
    model = model_of(arm.widths)
    handle = fallow.sparsify(model, fallow.SMET(**arm.smet)) if arm.smet else None
    optimizer = scratch_runs.optimizer_of(model, handle, resolve(load_file(experiments.RECIPE), {}))
    for step in range(arms.EVERY):
        if handle:
            handle.before_step(step, 1000)
        if step in (0, arms.EVERY - 1):
            ids = torch.randint(0, 8192, (1, 8))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if handle:
            handle.after_step(step, 1000)
    return scratch_runs.state_bytes(model, optimizer)


@pytest.mark.parametrize("percent", arms.DENSITIES)
def test_smaller_dense_models_have_at_most_smets_bytes(percent):
    small, smet = state_bytes(arms.ARMS[f"small-{percent}"]), state_bytes(arms.ARMS[f"smet-{percent}"])
    assert 0.95 * smet < small <= smet


def test_every_arm_is_a_valid_config_and_learns_at_its_rates():
    recipe = resolve(load_file(experiments.RECIPE), {})
    assert len(arms.ARMS) == len(arms.MAIN) + len(arms.ABLATIONS) + len(arms.SWEEP)
    for arm in arms.ARMS.values():
        if arm.smet:
            fallow.SMET(**arm.smet)
    for name, share in (("dense", 1.0), ("static-25", 1.0), ("smet-25", 2.0)):
        arm = arms.ARMS[name]
        model = model_of({})
        handle = fallow.sparsify(model, fallow.SMET(**arm.smet)) if arm.smet else None
        optimizer = scratch_runs.optimizer_of(model, handle, recipe, lr_scale=arm.lr_scale)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for parameter_name, p in model.named_parameters():
            inner = "layers" in parameter_name and "norm" not in parameter_name
            want = recipe.lr * scratch_runs.MATRIX_LR * share if inner else recipe.lr
            want *= scratch_runs.EMBEDDING_LR if "embed" in parameter_name else 1
            assert rates[id(p)] == pytest.approx(want), (name, parameter_name)
        assert len(rates) == len(list(model.parameters()))


def run_of(arm, seed, heldout, windows, **fields):
    return {"arm": arm, "seed": seed, "heldout": heldout, "windows": windows, "state_bytes": 10, "steps": 100} | fields


def test_rises_and_gaps_are_paired_by_seed():
    still = [[5.0, 5.0, *[4.9] * 10], [4.0, 4.0, *[3.8] * 10]]
    moved = [[5.0, 5.1, *[5.2] * 10], [4.0, 4.0, *[4.1] * 10]]
    data = {
        "runs": [
            run_of("dense", 0, 3.0, []),
            run_of("dense", 1, 4.0, []),
            run_of("dense-080", 0, 3.5, [], steps=80),
            run_of("static-25", 0, 3.1, still),
            run_of("set-25", 0, 3.4, moved),
            run_of("set-25", 1, 4.4, moved),
        ]
    }
    of = collated.summarise(data)
    assert of["set-25"].gaps == pytest.approx([0.4, 0.4])
    # seed 0: +0.2 and +0.1 against the resting form's -0.1 and -0.2; seed 1 has no resting form
    assert of["set-25"].rise == pytest.approx((0.3 + 0.15) / 2)
    assert collated.at_equal_seconds(data, "set-25", 0.8) == pytest.approx([3.4 - 3.5])
    assert collated.at_equal_seconds(data, "dense", 1.0) == []
    assert collated.on_line([(1, 10.0), (2, 8.0)], 3) == pytest.approx(6.0)


def test_the_page_is_filled_from_results(tmp_path):
    page = tmp_path / "docs" / "smet.md"
    page.parent.mkdir()
    page.write_text((ROOT / "docs/results/smet.md").read_text())
    results = tmp_path / "results"
    results.mkdir()
    said = figures.make(results, page)
    assert all("missing" in line for line in said) and "Not measured yet" in page.read_text()
    windows = [[5.0] * 12] * 2
    runs = [run_of(a.name, s, 4.0 + s / 10, windows) for a in arms.MAIN for s in (0, 1)]
    machine = {"cpu": "a CPU", "threads": 1, "memory_gb": 1}
    recipe = {"steps": 9, "batch_size": 4, "seq_len": 8, "lr": 1e-3, "betas": [0.9, 0.999]}
    (results / "smet-pretrain.json").write_text(json.dumps({"runs": runs, "recipe": recipe, "machines": [machine]}))
    pace = [{"arm": a.name, "step_time": 1.1} for a in arms.MAIN]
    (results / "smet-pace.json").write_text(json.dumps({"rows": pace}))
    rise = {"set": 0.02, "reset": 0.01, "smet": 0.001}
    spike = {"density": 0.25, "lr_exponent": 0.5, "lr_scale": 1.0, "stops": 3, "at_once": rise, "rise": rise}
    spike |= {"smet_of_set": 0.05, "curves": {n: [0.0, v, v] for n, v in rise.items()}}
    (results / "smet-spike.json").write_text(json.dumps({"rows": [spike]}))
    figures.make(results, page)
    text = page.read_text()
    assert "+0.0200 | +0.0100 | +0.0010 | **5%** |" in text
    assert "| rigl-10 | 2 | 4.0500 [4.0000 … 4.1000] |" in text
    assert (page.parent / "figures" / "smet-density.svg").read_text().startswith("<svg ")


@pytest.mark.skipif(not (ROOT / "../shared/data").is_dir(), reason="the recipe's text is not here")
def test_a_run_repeats_itself_and_follows_its_updates(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "../shared/data/technical-english-eval.txt").read_text()[:300_000])
    flags = {"steps": 2 * arms.EVERY + 1, "batch_size": 1, "seq_len": 16, "tokenizer_vocab": 400, "eval_tokens": 64}
    flags |= {"train_data": [str(text)], "eval_data": [str(text)]}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    recipe = resolve(load_file(experiments.RECIPE), flags)
    recipe = replace(recipe, architecture=recipe.architecture | shape)
    first, second = (experiments.train(recipe, arms.ARMS["smet-25"], 0) for _ in range(2))
    assert first["losses"] == second["losses"] and first["heldout"] == second["heldout"]
    assert [len(w) for w in first["windows"]] == [experiments.AFTER + 2, 3]
    assert first["metrics"]["smet/updates"] == 2
    assert len(experiments.train(recipe, arms.ARMS["dense"], 0)["windows"]) == 2
