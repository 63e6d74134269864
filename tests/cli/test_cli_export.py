"""`fallow export`: which model RUN means, where it goes, what is printed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.evaluation.subjects import run_folder, subject
from tests.tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fallow
from fallow.cli import main
from fallow.evaluation.subject import load
from fallow.exporting.agreement import agreement, probe
from fallow.training import models
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


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory) -> Path:
    """A finished run of method upcycle, and its exports to fallow: export-fallow, and int8 as int8/."""
    run = run_folder(tmp_path_factory.mktemp("runs") / "upcycle", subject(context=256))
    assert main(["export", str(run), "--to", "fallow"]) == 0
    assert main(["export", str(run), "--to", "fallow", "--int8", "--output", str(run / "int8")]) == 0
    return run


def test_an_upcycled_run_is_exported_with_its_predictors(upcycled, capsys) -> None:
    assert main(["export", str(upcycled), "--to", "fallow", "--overwrite", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["to"] == "fallow" and "predictors.safetensors" in figures["files"]
    sizes = [(upcycled / f / "model.safetensors").stat().st_size for f in ("export-fallow", "int8")]
    assert sizes[0] - sizes[1] > 6 * 64 * 32 * 3 * 0.9  # of four bytes a weight, one is left
    wanted = load(str(upcycled), verb="test")
    for folder in ("export-fallow", "int8"):
        found = load(str(upcycled / folder), verb="test")
        assert found.about["method"] == "upcycle" and found.modes == ("dense", "sparse")
        ids = torch.arange(64).view(1, 64) * 7
        with wanted.evaluated("sparse"), found.evaluated("sparse"):
            reached = agreement(wanted.model(input_ids=ids).logits, found.model(input_ids=ids).logits)
        assert reached.top1 > (0.99 if folder == "export-fallow" else 0.8), reached


@pytest.mark.parametrize("folder", ["export-fallow", "int8"])
def test_an_exported_folder_generates_and_is_evaluated(upcycled, folder, tmp_path, capsys) -> None:
    place = str(upcycled / folder)
    assert main(["generate", place, "--prompt", "The grass is", "--max-new-tokens", "4", "--eager", "--json"]) == 0
    (text,) = json.loads(capsys.readouterr().out)["generated"]
    assert text["mode"] == "sparse" and 1 <= text["tokens"] <= 4
    data = tmp_path / "text.txt"
    data.write_text("The grass is green. The sky is blue. " * 60)
    argv = [
        "evaluate",
        place,
        "--tasks",
        "perplexity",
        "--data",
        str(data),
        "--lengths",
        "64",
        "--limit",
        "2",
        "--json",
    ]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["modes"] == ["dense", "sparse"] and len(result["rows"]) == 1
    assert main(["export", place, "--to", "hf", "--output", str(tmp_path / "hf")]) == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert stock.config.model_type == "llama" and getattr(stock, "_fallow", None) is None


def test_lm_eval_takes_an_exported_folder(upcycled) -> None:
    pytest.importorskip("lm_eval")
    from fallow.evaluation.harness import FallowLM

    lm = FallowLM(str(upcycled / "export-fallow"), mode="sparse")
    loss, greedy = lm._loglikelihood_tokens([(("The sky", " is"), [5, 6], [7])])[0]
    assert loss < 0 and isinstance(greedy, bool)


def test_an_upcycled_run_is_dense_elsewhere_or_nothing(upcycled, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    for source in (upcycled, upcycled / "int8"):
        for to in ("mixtral", "gguf"):
            said = failure(capsys, source, "--to", to, "--output", out)
            assert f"{to} cannot express Upcycle's predictors" in said and "fallow" in said and not out.exists()
    assert "int8 is for fallow" in failure(capsys, upcycled, "--to", "hf", "--int8", "--output", out)
    assert main(["export", str(upcycled), "--to", "hf", "--output", str(out)]) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_a_dense_model_is_told_how_it_gets_predictors(model_folder, tmp_path, capsys) -> None:
    said = failure(capsys, model_folder, "--to", "fallow", "--output", tmp_path / "out")
    assert "this one has none; train it with method upcycle" in said and not (tmp_path / "out").exists()


def test_an_exported_folder_is_not_trained(upcycled) -> None:
    with pytest.raises(fallow.FallowError, match=r"for serving; train its dense companion: fallow export .* --to hf"):
        models.load(str(upcycled / "int8"), None, torch.float32)
