"""Upcycle's experiments: every arm is a valid recipe, arithmetic becomes text once, and tables come from JSON alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import upcycle_experiments as experiments  # noqa: E402
import upcycle_figures as figures  # noqa: E402
from upcycle_arms import ARMS, LONG, SETS  # noqa: E402

import fallow  # noqa: E402

MACHINE = {"cpu": "some CPU", "threads": 2, "memory_gb": 24}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe(name):
    recipe = experiments.recipe_of(name, steps=7)
    assert recipe.steps == 7
    assert recipe.tokens_per_step() == (8192 if name in LONG else 2048)
    config = recipe.method_config()
    assert config is None if ARMS[name] is None else isinstance(config, fallow.Upcycle)


def test_long_arms_see_ten_times_the_tokens():
    short, long = experiments.recipe_of("dense"), experiments.recipe_of("dense-long", threads=None)
    assert long.tokens_per_step() * long.steps == 10 * short.tokens_per_step() * short.steps
    assert long.threads == short.threads


def test_sets_name_arms_and_the_main_one_has_its_companion_and_control():
    assert {name for names in SETS.values() for name in names} == set(ARMS)
    assert {"dense", "random"} <= set(SETS["main"])


def test_arithmetic_is_written_as_documents(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    rows = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(3)]
    (shared / "gsm8k-train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "SHARED", shared)
    experiments.arithmetic()
    text = (tmp_path / "runs/experiments/gsm8k-train.txt").read_text()
    assert text.split("\n\n")[2] == "Question: 2+2?\nAnswer: 4"


def test_collating_keeps_arms_whose_folders_are_elsewhere(tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    monkeypatch.chdir(tmp_path)
    result.write_text(json.dumps({"runs": [{"arm": "dense", "losses": 1}], "unfinished": {"both": [], "random": [5]}}))
    here = tmp_path / "runs/experiments/upcycle-cpt/both"
    here.mkdir(parents=True)
    (here / "metrics.jsonl").write_text('{"kind": "eval", "step": 4, "loss": 2.0}\n{"kind": "train", "step": 4}\n')
    (here / "judged.json").write_text(json.dumps({"losses": {"text": {"dense": 2.0}}, "machine": MACHINE}))
    record = dict.fromkeys(("method", "precision", "totals", "eval", "versions"), 1) | {"arm": "both"}
    record["recipe"] = dict.fromkeys(("steps", "batch_size", "accumulate", "seq_len", "lr"), 2)
    (here / "run.json").write_text(json.dumps(record))
    experiments.collate(result)
    found = json.loads(result.read_text())
    assert [r["arm"] for r in found["runs"]] == ["both", "dense"] and found["unfinished"] == {"random": [5]}
    assert found["runs"][0]["curve"] == [{"step": 4, "loss": 2.0}] and found["runs"][1]["losses"] == 1
    assert found["runs"][0]["schedule"]["lr"] == 2


def _row(kind: str, keep: int, gap: float) -> dict:
    read = keep / 64
    return {
        "kind": kind,
        "allocation": "uniform",
        "keep": keep,
        "bytes": read,
        "bytes_7b": read,
        "mean_recall": 0.9,
        "gap": {"wikitext-2": gap, "postgresql": gap},
    }


def test_tables_say_what_the_json_says():
    rows = [_row("oracle", 16, 0.25), _row("oracle", 32, 0.02), _row("random", 16, 9.0)]
    data = {"experiment": "upcycle-front", "machine": MACHINE, "dense": {"wikitext-2": 3.0}, "tokens": 10, "rows": rows}
    table, drawn = figures.front(data)
    assert "| oracle | uniform | 16 | 25% | 25% | 0.900 | +0.250 | +0.250 |" in table
    assert "<svg" in drawn["upcycle-front"]

    def run(arm: str, losses: dict, looks: list) -> dict:
        return {"arm": arm, "totals": {"steps": 4}, "losses": {"wikitext-2": losses}, "looks": looks}

    recipe = {"seq_len": 512, "batch_size": 2, "accumulate": 2}
    runs = [run("dense", {"dense": 3.0}, []), run("quantized", {"dense": 3.02, "sparse": 3.08}, [{"recall": [0.9, 1]}])]
    table, _ = figures.cpt({"runs": runs, "recipe": recipe})
    assert "| quantized | 4 × 2,048 | 0.950 | 3.020, 3.080, **+0.080** |" in table

    for r, curve in zip(runs, ([2.5], [2.6]), strict=True):
        r["curve"] = [{"step": 4, "loss": loss, "sparse_loss": loss + 1} for loss in curve]
    table, _ = figures.curves({"runs": runs, "unfinished": {"random": [{"step": 2, "loss": 7.0}]}})
    assert "| quantized | – | 2.600, 3.600 |" in table and "| random | 7.000 | – |" in table


def test_the_ruler_table_pairs_the_sparse_model_with_its_companion():
    def evaluated(**modes: float) -> dict:
        cells = {m: [{"task": "ruler_vt", "length": 1024, "scores": [s, s]}] for m, s in modes.items()}
        return {"machine": MACHINE, "ruler": {m: {"cells": c} for m, c in cells.items()}}

    table, _ = figures.ruler(evaluated(sparse=0.25), evaluated(sparse=0.5), evaluated(dense=0.75))
    assert "| 1024 | 75.0 | 25.0 | **-50.0** [-50.0, -50.0] | 50.0 | **-25.0** [-25.0, -25.0] |" in table
    assert "2 documents of each task and length. By task, in this order: vt 75.0, 25.0, 50.0." in table


def test_the_repair_table_names_layer_and_recovery():
    def state(nats: float) -> dict:
        return {"nats": nats, "texts": {"a.txt": nats}}

    run = {
        "machine": MACHINE,
        "predictor": "linear",
        "rank": 64,
        "planted": 7,
        "diagnosis": {"sweep": {"restore": {"order": [7, 1]}, "mirror": {"order": [7, 2]}}},
        "healthy": state(1.0),
        "faulty": state(2.0),
        "repaired": state(1.1),
        "repair": {"accepted": "predictor"},
        "recovered": {"nats": 0.9},
    }
    table, _ = figures.repair(run)
    assert "| linear 64 | 7 | 7, 7 | 1.000, 2.000, 1.100 | **90%** | predictor | +0.1000 |" in table


def test_missing_results_name_their_command(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name, _, _ in figures.TABLES))
    said = figures.make(tmp_path, page)
    assert all("missing" in line for line in said)
    assert "python benchmarks/upcycle_front.py" in page.read_text()
