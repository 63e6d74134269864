"""`fallow export`: which model RUN means, where it goes, what is printed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fallow
from fallow.cli import main
from fallow.exporting.agreement import agreement, probe
from fallow.training.callback import save_state


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A stock model with nine tenths of its linear weights zero, and a tokenizer."""
    folder = tmp_path_factory.mktemp("stock") / "model"
    model = tiny_model("llama", dtype=torch.bfloat16)
    fallow.sparsify(model, fallow.SMET(density=0.1)).remove().save_pretrained(folder)
    words = Tokenizer(WordLevel({str(i): i for i in range(128)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, model_folder) -> Path:
    """runs/NAME with one finished arm."""
    arm = tmp_path / "runs" / "tiny" / "smet"
    (arm / "model").mkdir(parents=True)
    (arm / "run.json").write_text(json.dumps({"status": "finished"}))
    for file in model_folder.iterdir():
        (arm / "model" / file.name).write_bytes(file.read_bytes())
    return arm.parent


def failure(capsys, *argv: object) -> str:
    assert main(["export", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("arm", ["", "smet"])
def test_a_run_is_exported_beside_its_model(run, arm, capsys) -> None:
    assert main(["export", str(run / arm), "--to", "hf"]) == 0
    out = capsys.readouterr().out
    target = run / "smet" / "export-hf"
    assert str(target) in out and "verified  loaded again: 21 tensors" in out and "logits of 16 tokens" in out
    wanted = AutoModelForCausalLM.from_pretrained(run / "smet" / "model", dtype="auto").state_dict()
    found = AutoModelForCausalLM.from_pretrained(target, dtype="auto").state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert AutoTokenizer.from_pretrained(target)("5 7")["input_ids"] == [5, 7]


def test_packed_is_smaller_and_can_be_exported_again(run, tmp_path, capsys) -> None:
    assert main(["export", str(run), "--to", "packed", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    packed = run / "smet" / "export-packed"
    assert figures["path"] == str(packed) and figures["to"] == "packed" and figures["packed_layers"] == 14
    assert figures["weight_bytes"] == figures["files"]["packed.safetensors"]
    assert figures["ratio"] == figures["weight_bytes"] / figures["dense_bytes"] < 0.75  # embeddings stay dense
    assert figures["verified"] == ["loaded again: 21 tensors equal the model's bit for bit"]
    back = tmp_path / "back"
    assert main(["export", str(packed), "--to", "hf", "--output", str(back)]) == 0
    a, b = ((folder / "model.safetensors").read_bytes() for folder in (back, run / "smet" / "model"))
    assert a == b


def test_overwrite_is_asked_for(run, capsys) -> None:
    assert main(["export", str(run), "--to", "hf"]) == 0
    capsys.readouterr()
    assert "holds files already" in failure(capsys, run, "--to", "hf")
    assert main(["export", str(run), "--to", "hf", "--overwrite"]) == 0


def test_the_model_itself_is_never_overwritten(run, capsys) -> None:
    for output in (run / "smet" / "model", run / "smet", run):
        assert "holds the model" in failure(capsys, run, "--to", "packed", "--output", output, "--overwrite")
    assert (run / "smet" / "model" / "model.safetensors").exists()


def test_bad_use_is_one_line(run, tmp_path, capsys) -> None:
    unknown = failure(capsys, run, "--to", "onnx")
    assert "'onnx'" in unknown and "hf" in unknown and "packed" in unknown
    assert "--to" in failure(capsys, run)
    assert "is no folder" in failure(capsys, tmp_path / "nowhere", "--to", "hf")
    (tmp_path / "empty").mkdir()
    assert "neither a run (run.json) nor a model (config.json)" in failure(capsys, tmp_path / "empty", "--to", "hf")
    (run / "smet" / "run.json").write_text(json.dumps({"status": "interrupted"}))
    assert "is interrupted, not finished" in failure(capsys, run, "--to", "hf")
    (run / "dense").mkdir()
    (run / "dense" / "run.json").write_text(json.dumps({"status": "finished"}))
    assert "several arms; choose one" in failure(capsys, run, "--to", "hf")
    assert "holds no model" in failure(capsys, run / "dense", "--to", "hf")


def test_a_damaged_model_is_one_line(run, capsys) -> None:
    weights = run / "smet" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["export", str(run), "--to", "hf"]) != 0
    assert capsys.readouterr().err.count("\n") == 1
    assert not (run / "smet" / "export-hf").exists()


@pytest.fixture
def grouped(tmp_path) -> Path:
    """A finished run of method ssd as training leaves it: the stock model, and the method's state beside it."""
    arm = tmp_path / "runs" / "tiny" / "ssd"
    settings = {"experts": 8, "active": 2}
    model = tiny_model("llama", hidden_act="relu")
    handle = fallow.sparsify(model, fallow.SSD(**settings))
    with torch.no_grad():
        for layer in handle.experts():
            layer.router.add_(torch.randn_like(layer.router))  # as if it had learned
    (arm / "model").mkdir(parents=True)
    save_state(handle, arm / "model")
    torch.save(sparse_answer(model), arm / "answer.pt")
    handle.remove().save_pretrained(arm / "model")
    recipe = {"method": "ssd", "method_settings": settings}
    (arm / "run.json").write_text(json.dumps({"status": "finished", "recipe": recipe}))
    return arm


@torch.no_grad()
def sparse_answer(model) -> torch.Tensor:
    model.eval()
    with model._fallow.in_mode("sparse"):
        return model(input_ids=probe(128)).logits


def test_a_run_with_experts_is_exported_with_them(grouped, capsys) -> None:
    assert main(["export", str(grouped), "--to", "mixtral"]) == 0
    assert "verified  mixtral by stock transformers" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(grouped / "export-mixtral")
    with torch.no_grad():
        reached = agreement(torch.load(grouped / "answer.pt"), loaded(input_ids=probe(128)).logits)
    assert loaded.config.num_experts_per_tok == 2 and reached.top1 >= 0.995 and reached.error < 0.005, reached
    assert main(["export", str(grouped), "--to", "hf"]) == 0  # the dense one of the same weights
    dense = AutoModelForCausalLM.from_pretrained(grouped / "export-hf")
    assert dense.config.model_type == "llama"


def test_gguf_of_a_run_has_experts_unless_dense_is_said(grouped, capsys) -> None:
    gguf = pytest.importorskip("gguf")
    for flags, experts in (([], 8), (["--dense", "--overwrite"], None)):
        assert main(["export", str(grouped), "--to", "gguf", *flags]) == 0
        fields = gguf.GGUFReader(grouped / "export-gguf" / "model-f16.gguf").fields
        assert ("llama.expert_count" in fields) == (experts is not None)
    assert "model-f16.gguf" in {f.name for f in (grouped / "export-gguf").iterdir()}


def test_experts_without_their_settings_or_state_are_refused(grouped, model_folder, capsys) -> None:
    assert "mixtral needs experts and this model has none" in failure(capsys, model_folder, "--to", "mixtral")
    (grouped / "model" / "sparsity.safetensors").write_bytes(b"x")
    assert main(["export", str(grouped), "--to", "mixtral"]) == 1
    assert "holds no readable sparsity state" in capsys.readouterr().err
    (grouped / "run.json").write_text(json.dumps({"status": "finished"}))
    assert "does not tell the method's settings" in failure(capsys, grouped, "--to", "mixtral")
    assert not (grouped / "export-mixtral").exists()
