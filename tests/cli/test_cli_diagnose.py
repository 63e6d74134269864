"""`fallow diagnose`: what it writes beside a run and prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.evaluation.planted import plant
from tests.evaluation.subjects import run_folder, subject

from fallow.cli import main

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    made = subject(context=2048)
    plant(made.sparsity.layers[1], seed=0)
    return run_folder(tmp_path_factory.mktemp("runs") / "upcycle", made)


def failure(capsys, *argv: object) -> str:
    assert main(["diagnose", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_run_is_diagnosed_on_rulers_documents(run, capsys) -> None:
    argv = ["--tasks", "niah_single_1,niah_multikey_2", "--lengths", "1024", "--documents", "4", "--sweep", "4"]
    assert main(["diagnose", str(run), *argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((run / "diagnosis.json").read_text())
    assert [(g["task"], g["length"]) for g in result["gaps"]] == [("niah_single_1", 1024), ("niah_multikey_2", 1024)]
    for gap in result["gaps"]:
        assert gap["gap"]["mean"] == pytest.approx(gap["sparse"] - gap["dense"], abs=1e-6) and gap["gap"]["mean"] != 0
        assert gap["gap"]["level"] == 0.975, "two cells share the chance of a false one"
    assert result["asked"]["documents"] == 4 and result["layers"] == 2 and result["model"]["method"] == "upcycle"
    assert "Which layer breaks long context?" in (run / "diagnosis.html").read_text()

    assert main(["diagnose", str(run), *argv, "--output", str(run / "other.json")]) == 0
    assert result["verdict"] in " ".join(capsys.readouterr().out.split()) and (run / "other.html").is_file()


def test_bad_input_is_one_line_with_its_mend(run, tmp_path, capsys) -> None:
    assert "4096 tokens are beyond the context" in failure(capsys, run, "--lengths", 4096)
    assert "offline are ruler_cwe" in failure(capsys, run, "--tasks", "niah_single_2")
    assert "needs at least 4" in failure(capsys, run, "--documents", 1)
    assert "is no folder" in failure(capsys, tmp_path / "none")
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in (run / "model").iterdir():
        if not file.name.startswith("sparsity."):
            (plain / file.name).write_bytes(file.read_bytes())
    assert "needs a model with predictors" in failure(capsys, plain)
