"""`fallow evaluate`: what is printed in both modes, how a run's method comes back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.evaluation.subjects import run_folder, subject
from tests.training.tiny_runs import text

from fallow.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "upcycle", subject(context=256))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(text(3, 2000))
    return file


def failure(capsys, *argv: object) -> str:
    assert main(["evaluate", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_run_is_evaluated_both_ways(run, data, tmp_path, capsys) -> None:
    argv = ["--tasks", "perplexity", "--data", str(data), "--lengths", "64", "128", "--limit", "4"]
    assert main(["evaluate", str(run), *argv, "--json", "--output", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result == json.loads((tmp_path / "out.json").read_text()) and "nats per token" in err
    assert [row["length"] for row in result["rows"]] == [64, 128] and result["modes"] == ["dense", "sparse"]
    assert result["model"]["method"] == "upcycle" and result["model"]["dtype"] == "float32"
    for row in result["rows"]:
        dense, sparse, gap = row["dense"], row["sparse"], row["difference"]
        assert gap["mean"] == pytest.approx(sparse["mean"] - dense["mean"], abs=1e-6) and gap["mean"] != 0
        assert dense["low"] < dense["mean"] < dense["high"] and dense["samples"] == 4

    assert main(["evaluate", str(run / "model"), *argv, "--mode", "sparse"]) == 0
    out = capsys.readouterr().out
    assert f"{result['rows'][0]['sparse']['mean']:.3f}" in out and "sparse − dense" not in out


def test_a_plain_model_is_made_sparse_on_the_spot(run, data, tmp_path, capsys) -> None:
    for file in (run / "model").iterdir():
        if not file.name.startswith("sparsity."):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    argv = [tmp_path, "--tasks", "perplexity", "--data", data, "--lengths", 64, "--limit", 2, "--json"]
    sparse = ["--method", "upcycle", "--set", "bank=16", "keep=16"]
    assert main(["evaluate", *map(str, [*argv, *sparse])]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["difference"]["mean"] == pytest.approx(0, abs=1e-5), "all channels kept is the dense model"
    assert main(["evaluate", *map(str, argv)]) == 0
    assert json.loads(capsys.readouterr().out)["modes"] == ["dense"]
    assert "is a dense model" in failure(capsys, *argv[:-1], "--mode", "both")
    assert "--prompts needs an upcycled model" in failure(capsys, *argv[:-1], "--prompts", "dense")
    assert "--selection needs an upcycled model" in failure(capsys, *argv[:-1], "--selection", "oracle")


def test_controls_choose_in_the_predictors_place(run, data, capsys) -> None:
    argv = [run, "--tasks", "perplexity", "--data", data, "--lengths", 64, "--mode", "sparse", "--json"]
    losses = {}
    for selection in (None, "oracle", "random"):
        asked = ["--selection", selection] if selection else []
        assert main(["evaluate", *map(str, [*argv, *asked])]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["model"].get("selection") == selection
        losses[selection] = found["rows"][0]["sparse"]["mean"]
    assert len(set(losses.values())) == 3


def test_bad_input_is_one_line_with_its_mend(run, data, tmp_path, capsys) -> None:
    assert "512 tokens are beyond the context of" in failure(capsys, run, "--tasks", "ruler", "--lengths", 512)
    assert "name files with --data" in failure(capsys, run, "--tasks", "perplexity")
    assert "such file" in failure(
        capsys, run, "--tasks", "perplexity", "--data", tmp_path / "none.txt", "--lengths", 64
    )
    assert "is no folder" in failure(capsys, tmp_path / "none")
    assert "--limit 0" in failure(capsys, run, "--limit", 0)
    assert "did you mean 'keep'" in failure(capsys, run, "--method", "upcycle", "--set", "keeps=3")
    assert "sparse already" in failure(capsys, run, "--method", "upcycle")
    assert "--set needs --method" in failure(capsys, run, "--set", "keep=3")
    (tmp_path / "broken").mkdir()
    assert "neither a run" in failure(capsys, tmp_path / "broken")


def test_an_unknown_task_is_refused_with_the_nearest(run, capsys) -> None:
    pytest.importorskip("lm_eval")
    assert "did you mean 'hellaswag'" in failure(capsys, run, "--tasks", "helaswag", "--lengths", 64)


def test_predictors_of_other_weights_are_refused(run, data, tmp_path, capsys) -> None:
    other = run_folder(tmp_path / "other", subject(context=256, seed=1))
    for file in ("sparsity.safetensors", "sparsity.json"):
        (other / "model" / file).write_bytes((run / "model" / file).read_bytes())
    import safetensors.torch as safe

    weights = other / "model" / "model.safetensors"
    tensors = safe.load_file(weights)
    name = next(n for n in tensors if n.endswith("up_proj.weight"))
    tensors[name] = tensors[name] + 1.0
    safe.save_file(tensors, weights, metadata={"format": "pt"})
    assert main(["evaluate", str(other), "--tasks", "perplexity", "--data", str(data), "--lengths", "64"]) == 1
    assert "belong to other weights" in capsys.readouterr().err
