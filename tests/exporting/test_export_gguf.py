"""GGUF files: llama.cpp answers as the model does, cuts text as its tokenizer does, or nothing is written."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from tests.exporting.test_export_moe import LLAMA3, made
from tests.tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import fallow
from fallow import SSD
from fallow.errors import CheckpointError, UnsupportedModelError
from fallow.exporting import gguf, gguf_check, moe
from fallow.exporting.agreement import agreement, probe

reader = pytest.importorskip("gguf")

CASES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("arcee", {"hidden_act": "relu2"}),
]


@torch.no_grad()
def answers(model, mode: str) -> torch.Tensor:
    model.eval()
    if getattr(model, "_fallow", None) is None:
        return model(input_ids=probe(128)).logits
    with model._fallow.in_mode(mode):
        return model(input_ids=probe(128)).logits


def llama_answers(folder) -> torch.Tensor:
    pytest.importorskip("llama_cpp")
    (file,) = folder.glob("*.gguf")
    engine = gguf_check.load(file)
    try:
        return gguf_check.logits(engine, probe(128))
    finally:
        engine.close()


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_llama_cpp_answers_as_the_model(tmp_path, family, changes, mode) -> None:
    model, handle = made(family, active=3, **changes)
    handle.set_mode(mode)
    done = fallow.export(model, tmp_path / "out", to="gguf")
    assert list(done.files) == ["model-f16.gguf"] and done.weight_bytes == done.files["model-f16.gguf"]
    reached = agreement(answers(model, mode), llama_answers(tmp_path / "out"))
    assert reached.top1 >= 0.98 and reached.error <= 0.005, reached
    other = agreement(answers(model, "dense" if mode == "sparse" else "sparse"), llama_answers(tmp_path / "out"))
    assert other.top1 < 0.95 and other.error > 0.05, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_f32_is_nearer_than_f16(tmp_path, dtype) -> None:
    model, _ = made(dtype=dtype, active=4)
    fallow.export(model, tmp_path / "f32", to="gguf_f32")
    done = fallow.export(model, tmp_path / "f16", to="gguf")
    assert (tmp_path / "f32" / "model-f32.gguf").stat().st_size > 1.5 * done.weight_bytes
    if dtype == torch.float32:
        wanted = answers(model, "sparse")
        near, far = (agreement(wanted, llama_answers(tmp_path / name)) for name in ("f32", "f16"))
        assert near.top1 >= 0.995 and near.error <= 0.002, near
        assert far.top1 >= 0.98, far


def test_what_the_file_says_and_holds(tmp_path) -> None:
    model, handle = made(active=4)
    fallow.export(model, tmp_path / "out", to="gguf")
    file = reader.GGUFReader(tmp_path / "out" / "model-f16.gguf")
    told = {name: field.contents() for name, field in file.fields.items()}
    assert told["general.architecture"] == "llama" and told["general.name"] == "out"
    wanted = {"expert_count": 8, "expert_used_count": 4, "feed_forward_length": 8, "block_count": 2}
    wanted |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    assert {name: told[f"llama.{name}"] for name in wanted} == wanted
    tensors = {t.name: t for t in file.tensors}
    layer = handle.experts()[0]
    up = torch.tensor(tensors["blk.0.ffn_up_exps.weight"].data.astype(np.float32)) * moe._GATE_SCALE_FP16**0.5
    assert torch.allclose(up.reshape(64, 32), layer.view.weights().w_up_FD, rtol=2**-10, atol=1e-6)
    assert tensors["blk.0.ffn_gate_inp.weight"].data.dtype == np.float32
    assert tensors["blk.0.ffn_down_exps.weight"].data.dtype == np.float16
    assert "rope_freqs.weight" not in tensors


def test_a_model_without_a_method_is_written_dense(tmp_path) -> None:
    for number, act in enumerate(("silu", "relu")):
        model = tiny_model("llama", hidden_act=act)
        fallow.export(model, tmp_path / str(number), to="gguf")
        reached = agreement(answers(model, "dense"), llama_answers(tmp_path / str(number)))
        assert reached.top1 >= 0.98 and reached.error <= 0.005, reached


def byte_level(pre=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    backend.train_from_iterator(["the quick brown fox isn't 2024 lazy; return {'a': x**2}\n\n\t"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>")


@pytest.mark.parametrize("to", ["gguf", "gguf_f32"])
def test_a_byte_level_tokenizer_goes_along(tmp_path, to) -> None:
    pytest.importorskip("llama_cpp")
    tokenizer = byte_level()
    model = tiny_model("llama", hidden_act="relu", vocab_size=len(tokenizer) + 7)
    fallow.sparsify(model, SSD(experts=8, active=4))
    done = fallow.export(model, tmp_path / "out", to=to, tokenizer=tokenizer)
    assert any("texts become the same tokens" in line for line in done.verified)
    (file,) = (tmp_path / "out").glob("*.gguf")
    engine = gguf_check.load(file)
    text = "it's the 2nd lazy fox's  return\n\n\n of 12345 ünïcode — <|end|> and more"
    assert engine.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text)["input_ids"]
    assert engine.token_eos() == tokenizer.eos_token_id
    assert engine.detokenize(tokenizer("the quick brown")["input_ids"]) == b"the quick brown"
    engine.close()


def test_a_tokenizer_llama_cpp_has_no_equal_of_is_left_out_and_told(tmp_path) -> None:
    odd = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = byte_level(odd)
    model = tiny_model("llama", hidden_act="relu", vocab_size=len(tokenizer))
    done = fallow.export(model, tmp_path / "out", to="gguf", tokenizer=tokenizer)
    assert "no vocabulary in the file" in done.verified[-1] and "no equal of this BPE tokenizer" in done.verified[-1]


def test_a_wrong_cut_of_text_is_noticed(tmp_path, monkeypatch) -> None:
    pytest.importorskip("llama_cpp")
    from fallow.exporting import gguf_vocab

    monkeypatch.setattr(gguf_vocab, "_cut", lambda pre: "llama-bpe")
    tokenizer = byte_level()
    model = tiny_model("llama", hidden_act="relu", vocab_size=len(tokenizer))
    with pytest.raises(CheckpointError, match="into other tokens than the tokenizer"):
        fallow.export(model, tmp_path / "out", to="gguf", tokenizer=tokenizer)
    assert os.listdir(tmp_path) == []


def test_wrong_files_are_noticed(tmp_path, monkeypatch) -> None:
    pytest.importorskip("llama_cpp")
    fold = moe.fold

    def naive(layer, weighting, **kwargs):
        folded = fold(layer, weighting, **kwargs)
        return folded._replace(router_ED=layer.router.detach().float(), down_EDC=folded.down_EDC / layer.active)

    for name, change in (
        ("fold", naive),
        ("pairs_from_halves", lambda x, heads: x),
        ("rope_factors", lambda model: torch.full((4,), 3.0)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(gguf, name, change)
            model, _ = made()
            with pytest.raises(CheckpointError, match=r"by llama\.cpp does not answer as the training-time forward"):
                fallow.export(model, tmp_path / "out", to="gguf")
    assert os.listdir(tmp_path) == []


def test_weights_beyond_f16_are_named(tmp_path) -> None:
    model = tiny_model("llama", hidden_act="relu")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = 1000.0  # times 2^8
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_gate\.weight is beyond the range of float16.*gguf_f32"):
        fallow.export(model, tmp_path / "out", to="gguf")


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("mistral", {"sliding_window": 16}, "gguf cannot express sliding-window attention"),
        ("qwen3", {}, "norms of queries and keys per head"),
        ("granite", {}, "residual_multiplier"),
        ("llama", {"hidden_act": "gelu"}, "gated with gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "default, linear or llama3; this model's is yarn",
        ),
    ],
)
def test_what_llama_cpp_cannot_express_is_named(tmp_path, family, changes, match) -> None:
    model = tiny_model(family, **({"hidden_act": "relu"} | changes))
    with pytest.raises(UnsupportedModelError, match=match):
        fallow.export(model, tmp_path / "out", to="gguf")
    assert os.listdir(tmp_path) == []


def test_an_earlier_export_can_be_replaced(tmp_path) -> None:
    model, _ = made()
    fallow.export(model, tmp_path / "out", to="gguf")
    fallow.export(model, tmp_path / "out", to="gguf", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
