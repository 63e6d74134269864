"""Models from scratch: one start for every arm and dtype, a tokenizer blind to held-out text, resume, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fallow.cli.compare import compare_command
from fallow.cli.train import train_command
from fallow.errors import ConfigError
from fallow.training import data, scratch
from fallow.training import tokenizer as tokenizers
from fallow.training.progress import Display
from fallow.training.run import run
from fallow.training.settings import load_file as load_recipe
from fallow.training.settings import parse_flags, resolve
from tests.tiny_models import _SETTINGS, FAMILIES
from tests.training.test_resume import finish, start, wait_for_step, write
from tests.training.tiny_runs import settings, text

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
VOCAB = 300


def new(root: Path, **changes: Any) -> dict[str, Any]:
    return settings(root, architecture=TINY, tokenizer_vocab=VOCAB) | changes


def begin(root: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> scratch.Start:
    return scratch.start(resolve(new(root, **changes), {}), dtype)


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_new_model_learns_and_is_stock_when_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path / "r.yaml", new(tmp_path, steps=40, lr=1e-2))
    assert train_command([str(recipe), "--json"]) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert "tokenizer  byte-level BPE of 300 entries" in shown.err
    facts = record["model"]
    assert (facts["name"], facts["family"], facts["vocab"], facts["ffn"]) == ("new llama", "llama", VOCAB, 64)
    losses = record["eval"]
    assert losses["before"]["loss"] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert losses["after"]["loss"] < math.log(VOCAB) - 1.5
    folder = tmp_path / "runs/tiny/dense/model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    config, loaded = model.config, AutoTokenizer.from_pretrained(folder)
    ends = {getattr(o, f"{t}_token_id") for o in (config, loaded) for t in ("bos", "eos", "pad")}
    assert len(ends) == 1 and loaded.eos_token == tokenizers.END
    assert config.max_position_embeddings == 64 and config.tie_word_embeddings
    trained, _ = tokenizers.tokenizer_for(resolve(new(tmp_path), {}))
    sample = "the old  dog sees\n\ta naïve 猫.\n"
    assert loaded(sample)["input_ids"] == trained(sample)["input_ids"]
    assert loaded.decode(loaded(sample)["input_ids"]) == sample


def test_every_arm_and_dtype_starts_at_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one, other = begin(tmp_path, method="sat", omit=0.5), begin(tmp_path, lr=0.5, batch_size=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(one.model.state_dict(), other.model.state_dict())
    bf16 = begin(tmp_path, torch.bfloat16).model
    assert {w.dtype for w in bf16.state_dict().values()} == {torch.bfloat16}
    assert same_weights({k: w.bfloat16() for k, w in one.model.state_dict().items()}, bf16.state_dict())
    buffers = {name: b.dtype for name, b in bf16.named_buffers()}
    assert buffers and set(buffers.values()) == {torch.float32}, "rotary frequencies are not rounded"
    assert not same_weights(one.model.state_dict(), begin(tmp_path, seed=1).model.state_dict())


def test_arms_compare_from_one_start_and_may_differ_in_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {
        "dense": {},
        "sat": {"method": "sat", "omit": 0.5},
        "small": {"architecture": TINY | {"num_hidden_layers": 1}},
    }
    recipe = write(tmp_path / "r.yaml", new(tmp_path, steps=2, arms=arms))
    assert compare_command([str(recipe)]) == 0
    assert capsys.readouterr().out.count("tokenizer  ") == 3
    found = {arm: json.loads((tmp_path / f"runs/tiny/{arm}/run.json").read_text()) for arm in arms}
    before = {arm: record["eval"]["before"]["loss"] for arm, record in found.items()}
    assert before["dense"] == before["sat"] != before["small"]
    assert [record["model"]["layers"] for record in found.values()] == [2, 2, 1]
    assert len({record["data"]["digest"] for record in found.values()}) == 1


def test_killed_and_resumed_equals_never_killed(tmp_path: Path) -> None:
    common = new(tmp_path, steps=60, save_every=4, batch_size=1)
    run(resolve(common | {"name": "whole"}, {}), display=Display(silent=True))
    cut = write(tmp_path / "cut.yaml", common | {"name": "cut"})
    process = start(cut)
    wait_for_step(tmp_path / "runs/cut/dense/metrics.jsonl", 13, process)
    process.kill()
    process.wait()
    assert "resuming   from checkpoint-" in finish(cut)
    whole, again = (load_file(tmp_path / f"runs/{name}/dense/model/model.safetensors") for name in ("whole", "cut"))
    assert same_weights(whole, again)


def test_the_tokenizer_is_the_same_whoever_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve(new(tmp_path), {})
    first, line = tokenizers.tokenizer_for(recipe)
    tables = {first.backend_tokenizer.to_str()}  # type: ignore[attr-defined]
    for cache in ("one", "other"):
        monkeypatch.setenv("FALLOW_CACHE", str(tmp_path / cache))
        for _ in range(2):
            again, _ = tokenizers.tokenizer_for(recipe)
            tables.add(again.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        assert len(list((tmp_path / cache / "tokenizers").iterdir())) == 1
    assert len(tables) == 1 and "300 entries" in line
    assert tokenizers.entries(first) == len(first) == VOCAB
    (tmp_path / "text.txt").write_text("quite another text, " * 500)
    assert tokenizers.tokenizer_for(recipe)[0].get_vocab() != first.get_vocab()


@pytest.mark.parametrize("own", [False, True])
def test_the_tokenizer_never_sees_held_out_text(tmp_path: Path, own: bool) -> None:
    changes: dict[str, Any] = {}
    settings(tmp_path)
    if own:
        (tmp_path / "held.txt").write_text("314159265 " * 500)
        changes = {"eval_data": [str(tmp_path / "held.txt")]}
    else:
        (tmp_path / "text.txt").write_text(text(0, 3000) + "\n" + "314159265 " * 150)
    recipe = resolve(new(tmp_path, **changes), {})
    train, held = data.Text.of(recipe).documents()
    assert "314159265" in held[0]["text"] and "314159265" not in train[0]["text"]
    trained, _ = tokenizers.tokenizer_for(recipe)
    assert len(trained.tokenize("314159265")) == 9, "no merge of a held-out word"


def test_the_sample_is_bounded_and_spread_over_all_texts() -> None:
    texts = ["a" * 1000, "b" * 10, "c" * 5000, *("d" * 7 for _ in range(100))]
    assert "".join(tokenizers.sample(texts, 10_000, 16)) == "".join(texts)
    some = "".join(tokenizers.sample(texts, 2000, 16))
    assert 1980 <= len(some) <= 2016
    for letter, there in (("a", 1000), ("c", 5000), ("d", 700)):
        assert some.count(letter) == pytest.approx(there * 2000 / 6710, abs=20)
    assert list(tokenizers.sample([], 10)) == []


def test_the_tokenizer_of_an_existing_model(tmp_path: Path) -> None:
    found = begin(tmp_path, tokenizer_vocab=0)
    assert found.tokenizer_origin == f"of {tmp_path / 'model'}, 260 entries"
    config = found.model.config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (260, 257, 256)
    assert config.bos_token_id is None, "the tokenizer has none"
    alone = tmp_path / "alone"
    found.tokenizer.save_pretrained(str(alone))
    assert begin(tmp_path, tokenizer_vocab=0, model=str(alone)).model.config.vocab_size == 260
    wide = begin(tmp_path, tokenizer_vocab=0, architecture=TINY | {"vocab_size": 512, "pad_token_id": 511}).model
    assert wide.get_input_embeddings().weight.shape == (512, 32) and wide.config.pad_token_id == 511  # type: ignore
    with pytest.raises(ConfigError, match="no Hugging Face model"):
        begin(tmp_path, tokenizer_vocab=0, model=str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_built(tmp_path: Path, family: str) -> None:
    model_type, fields = _SETTINGS[family]
    filled = ("vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
    architecture = {"model_type": model_type} | {k: v for k, v in fields.items() if k not in filled}
    model = begin(tmp_path, architecture=architecture).model
    assert model.config.vocab_size == VOCAB and model.config.eos_token_id == 0
    assert model.training


def test_numbers_as_yaml_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("architecture: {model_type: llama, rms_norm_eps: 1e-5, head_dim: null, rope_theta: 5000}\n")
    recipe = resolve(load_recipe(path), parse_flags(["--tokenizer-vocab", "300"]))
    assert recipe.architecture["head_dim"] is None, "null is a value here"
    config = scratch._config(recipe, None)
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters["rope_theta"] == 5000


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": None}, "model_type is missing; e.g. architecture: {model_type: llama}"),
        ({"model_type": "lama"}, "'lama' is unknown to transformers; did you mean 'llama'"),
        ({"model_type": "vit"}, "'vit' is no causal language model"),
        ({"model_type": "gemma3"}, "no vocabulary of its own; use model_type: gemma3_text"),
        ({"hidden_sise": 32}, "llama has no field 'hidden_sise'; did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"hidden_size": 33}, "hidden size .33. is not a multiple of the number of attention heads .4."),
        ({"dtype": "bfloat16"}, "dtype is not set here; use precision"),
        ({"max_position_embeddings": 63}, "max_position_embeddings=63 is shorter than seq_len=64; lower seq_len"),
        ({"num_key_value_heads": 3}, "no llama can be built so .*key-value heads"),
        ({"hidden_act": "silly"}, "no llama can be built so .*silly"),
        ({"vocab_size": 299}, "vocab_size=299 is smaller than the tokenizer's 300 entries; leave vocab_size out"),
        ({"eos_token_id": 300}, "eos_token_id=300 lies outside the 300 embeddings"),
    ],
)
def test_bad_architectures_are_one_line_with_the_mend(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        begin(tmp_path, architecture=TINY | change)
    assert "\n" not in str(caught.value)


def test_bad_settings_are_found_before_anything_runs(tmp_path: Path) -> None:
    for settings_, message in (
        ({"tokenizer_vocab": 300}, "tokenizer_vocab needs architecture: the weights of an existing model belong to"),
        ({"architecture": TINY, "tokenizer_vocab": 256}, "must be at least 257"),
        ({"architecture": TINY, "tokenizer_vocab": -1}, "must be at least 257"),
        ({"architecture": TINY | {"hidden_sise": 1}}, "did you mean 'hidden_size'"),
        ({"architecture": "llama"}, "must be of type"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(settings_, {})
    masked = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match="sees the token it should predict; set is_decoder: true"):
        begin(tmp_path, architecture=masked)
