"""`fallow repair`: from a diagnosis to a written model that the other verbs read; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.evaluation.planted import answers_of, plant, sound
from tests.evaluation.subjects import run_folder
from tests.training.tiny_runs import text

import fallow
from fallow.cli import main
from fallow.evaluation import mended
from fallow.evaluation.diagnosis import nats_of
from fallow.evaluation.repairing import Asked, Documents, repair_layer
from fallow.evaluation.subject import load

SETTINGS = {"keep": 8, "rank": 28}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    made = sound("bilinear")
    plant(made.sparsity.layers[2], seed=0)
    return run_folder(tmp_path_factory.mktemp("runs") / "upcycle", made, **SETTINGS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    for name, seed in (("learn.txt", 1), ("held.txt", 2)):
        (folder / name).write_text(text(seed, 4000))
    return ["--data", str(folder / "learn.txt"), "--held-data", str(folder / "held.txt")]


def failure(capsys, *argv: object) -> str:
    assert main(["repair", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_repaired_model_is_written_with_its_record_and_read_again(run, tmp_path) -> None:
    made = load(str(run), verb="test")
    held = answers_of(made, count=64, lengths=(24,), seed=9)
    papers = Documents(answers=answers_of(made, count=16, lengths=(24,)), held=held, texts={})
    windows = torch.randint(2, 2000, (16, 128), generator=torch.Generator().manual_seed(0))
    asked = Asked(data=["a"], held_data=["b"], lengths=(24,), steps=150, repairs=("refit",))
    record = repair_layer(made, 2, papers, windows, asked)
    assert record["accepted"]
    folder = mended.write(made, tmp_path / "out", record)
    assert json.loads((folder / "repair.json").read_text()) == record
    assert json.loads((folder / "run.json").read_text())["repair"]["layer"] == 2

    again = load(str(folder), verb="test")
    assert nats_of(again, held, mode="sparse") == pytest.approx(nats_of(made, held, mode="sparse"), abs=1e-5)
    sick = load(str(run), verb="test")
    assert sum(nats_of(sick, held, mode="sparse")) > sum(nats_of(again, held, mode="sparse"))
    layers = zip(again.sparsity.layers, sick.sparsity.layers, strict=True)
    same = [
        all(map(torch.equal, a.predictor.state_dict().values(), b.predictor.state_dict().values())) for a, b in layers
    ]
    assert same == [True, True, False, True], "one layer's predictor is another"


def test_the_command_repairs_what_the_diagnosis_names(run, texts, tmp_path, capsys) -> None:
    pytest.importorskip("lm_eval")
    diagnosis = {
        "kind": "diagnosis",
        "sweep": {"layer": 2, "local": True},
        "asked": {"tasks": ["niah_single_1"], "lengths": [1024], "seed": 3},
    }
    (tmp_path / "diagnosis.json").write_text(json.dumps(diagnosis))
    argv = [str(run), "--diagnosis", str(tmp_path), "--output", str(tmp_path / "out"), "--documents", "4"]
    quick = ["--steps", "2", "--tokens", "1024", "--repairs", "refit", "--json"]
    before = (run / "run.json").read_text()
    info = json.loads(before)
    info["recipe"] |= {"train_data": texts[1:2], "eval_data": texts[3:]}  # where the command finds them
    (run / "run.json").write_text(json.dumps(info))
    code = main(["repair", *argv, *quick])
    (run / "run.json").write_text(before)
    out, err = capsys.readouterr()
    if code == 2:  # a random model's answers to RULER are chance: the layer may cost it nothing
        assert "nothing to repair in it" in err
        return
    record = json.loads(out)
    assert record["layer"] == 2 and record["asked"]["tasks"] == ["niah_single_1"] and record["asked"]["seed"] == 3
    assert code == (0 if record["accepted"] else 1)
    assert (tmp_path / "out" / "model" / "config.json").is_file() == bool(record["accepted"])


def test_bad_input_is_one_line_with_its_mend(run, texts, tmp_path, capsys) -> None:
    assert "which layer?" in failure(capsys, run, *texts)
    assert "no layer 9; the model has layers 0 to 3" in failure(capsys, run, "--layer", 9, *texts)
    assert "name --data, plain text" in failure(capsys, run, "--layer", 1)
    assert "no such file" in failure(capsys, run, "--diagnosis", tmp_path / "none.json", *texts)
    (tmp_path / "d.json").write_text('{"kind": "diagnosis", "sweep": null}')
    assert "found no gap" in failure(capsys, run, "--diagnosis", tmp_path / "d.json", *texts)
    (tmp_path / "d.json").write_text('{"kind": "diagnosis", "sweep": {"layer": 1, "local": false}}')
    assert "blames no single layer" in failure(capsys, run, "--diagnosis", tmp_path / "d.json", *texts)
    (tmp_path / "d.json").write_text("{")
    assert "no readable diagnosis" in failure(capsys, run, "--diagnosis", tmp_path / "d.json", *texts)
    assert "holds the model" in failure(capsys, run, "--layer", 1, *texts, "--output", run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "is not empty" in failure(capsys, run, "--layer", 1, *texts, "--output", tmp_path / "full")
    made = load(str(run), verb="test")
    fallow.export(made.model, tmp_path / "export", to="fallow", tokenizer=made.tokenizer, int8=True)
    assert "has int8 weights; repair the run" in failure(capsys, tmp_path / "export", "--layer", 1, *texts)
    assert "known are keep" in failure(capsys, run, "--layer", 1, *texts, "--repairs", "magic")
