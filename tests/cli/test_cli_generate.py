"""`fallow generate`: the text of stock generation, in either mode, streamed or not; its figures; what is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from tests.evaluation.subjects import run_folder, subject, tokenizer

from fallow.cli import main

PROMPT = "The grass is green. The sky"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "upcycle", subject(context=256))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What stock `generate` says, 12 tokens."""
    made, found = subject(context=256), {}
    ids = torch.tensor([tokenizer()(PROMPT).input_ids])
    for mode in ("dense", "sparse"):
        with made.evaluated(mode) as model:
            out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=True)
        found[mode] = tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert found["dense"] != found["sparse"]
    return found


def generate(model: object, *argv: object, prompt: str = PROMPT) -> int:
    words = ["generate", model, "--prompt", prompt, "--max-new-tokens", 12, "--eager", "--no-stop", *argv]
    return main([str(word) for word in words])


def failure(capsys, model: object, *argv: object, **how: str) -> str:
    assert generate(model, *argv, **how) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("stream", [False, True])
def test_a_runs_text_is_printed_and_timed(run, texts, stream, capsys) -> None:
    assert generate(run, *(["--stream"] if stream else [])) == 0
    out = capsys.readouterr().out
    assert out.strip().startswith(texts["sparse"].strip()), "sparse is a run's default"
    rate = re.search(r"sparse: 12 tokens, ([\d.]+) tokens/s \(eager; first token after [\d.]+ s\)", out)
    assert rate and float(rate[1]) > 0


def test_both_modes_as_json(run, texts, capsys) -> None:
    assert generate(run / "model", "--mode", "both", "--json", "--stream") == 0
    result = json.loads(capsys.readouterr().out)
    assert [g["text"] for g in result["generated"]] == [texts["dense"], texts["sparse"]]
    assert [g["mode"] for g in result["generated"]] == ["dense", "sparse"]
    assert result["model"]["method"] == "upcycle" and result["prompt"] == PROMPT
    for figures in result["generated"]:
        assert figures["tokens"] == 12 and figures["stopped"] == "length" and figures["loop"] == "eager"
        assert figures["tokens_per_second"] > 0 and figures["compile_seconds"] == 0


def test_both_modes_are_compared(run, capsys) -> None:
    assert generate(run, "--mode", "both") == 0
    out = capsys.readouterr().out
    assert "[dense]" in out and "[sparse]" in out and re.search(r"sparse is [\d.]+ times as fast", out)


def test_a_plain_model_is_made_sparse_on_the_spot(run, texts, tmp_path, capsys, monkeypatch) -> None:
    for file in (run / "model").iterdir():
        if not file.name.startswith("sparsity."):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert generate(tmp_path) == 0
    assert texts["dense"].strip() in capsys.readouterr().out, "a plain model is dense"
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert generate(tmp_path, "--method", "upcycle", "--set", "bank=16", "keep=16", prompt="-") == 0
    out = capsys.readouterr().out
    assert texts["dense"].strip() in out and "sparse: 12 tokens" in out, "all channels kept is the dense model"
    assert "dense model" in failure(capsys, tmp_path, "--mode", "sparse")


def test_a_seed_gives_the_same_draws(run, capsys) -> None:
    drawn = []
    for seed in (1, 1, 2):
        assert generate(run, "--temperature", "2", "--top-p", "0.9", "--seed", seed, "--json") == 0
        drawn.append(json.loads(capsys.readouterr().out)["generated"][0]["text"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_refused(run, tmp_path, capsys) -> None:
    assert "beyond the context" in failure(capsys, run, "--max-new-tokens", "400")
    assert "must be 1 or more" in failure(capsys, run, "--max-new-tokens", "0")
    assert "--prompt is empty" in failure(capsys, run, prompt="  ")
    assert "top_p=3" in failure(capsys, run, "--top-p", "3")
    assert "generate: " in failure(capsys, tmp_path)
