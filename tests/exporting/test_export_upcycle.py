"""`--to fallow`: what stock transformers loads after `import fallow` is the upcycled model, or nothing is written."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tests.exporting.test_export_gguf import byte_level
from tests.exporting.upcycled_folders import SMALL, load, logits, made
from tests.tiny_models import tiny_batch, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import fallow
from fallow import Upcycle
from fallow.anatomy.int8 import Int8Linear
from fallow.errors import ConfigError
from fallow.exporting.agreement import agreement, probe
from fallow.exporting.hf import take_buffers
from fallow.exporting.upcycled import PREDICTORS
from fallow.methods.upcycle import UpcycleMethod, layers
from fallow.ops.bank_ffn import Int8Rows

CASES = [
    ("llama", torch.float32, {"predictor": "linear", "rank": 16, "gate": "smooth"}),
    ("llama", torch.bfloat16, {"predictor": "bilinear", "rank": 16}),
    ("gemma3", torch.bfloat16, {"predictor": "quantized", "keep": (2, 8), "bits": 2}),
    ("phi3", torch.float32, {"predictor": "quantized", "criterion": "contribution"}),
]


def python(code: str, *args: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- what is loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("family", "dtype", "settings"), CASES)
def test_the_folder_loads_as_the_upcycled_model(tmp_path, family, dtype, settings, int8) -> None:
    model, handle = made(family, dtype, **settings)
    state = torch.get_rng_state()
    done = fallow.export(model, tmp_path / "out", to="fallow", int8=int8)
    assert torch.equal(state, torch.get_rng_state())
    assert model._fallow is handle and handle.mode == "sparse"
    loaded = load(tmp_path / "out")
    ours = loaded._fallow
    assert type(loaded) is type(model) and loaded.dtype == dtype and not loaded.training
    assert type(ours) is type(handle) and ours.mode == "sparse"
    assert [x.keep for x in ours.layers] == [x.keep for x in handle.layers]
    assert loaded.config.model_type == model.config.model_type
    take_buffers(model, loaded)  # tiny_model's rotary frequencies are rounded to its dtype
    reached = agreement(logits(model), logits(loaded))
    if not int8:
        assert reached.top1 >= 0.995 and reached.error < 0.002, reached
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert agreement(logits(model), logits(loaded, "dense")).error > 2 * reached.error
    if not int8:
        assert agreement(logits(model, "dense"), logits(loaded, "dense")).error < 0.01
    assert sorted(done.files) == ["config.json", "generation_config.json", "model.safetensors", PREDICTORS]
    assert "probe.input_ids" not in load_file(tmp_path / "out" / PREDICTORS)


def test_generate_goes_on_as_the_model_did(tmp_path) -> None:
    model, _ = made(model={"tie_word_embeddings": True})
    model.generation_config.repetition_penalty = 1.3
    fallow.export(model, tmp_path / "out", to="fallow")
    loaded = load(tmp_path / "out")
    assert loaded.generation_config.repetition_penalty == 1.3
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    ids = tiny_batch(tokens=6, batch=1)["input_ids"]
    wanted, found = (m.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True) for m in (model, loaded))
    assert torch.equal(wanted, found)
    loaded._fallow.set_mode("dense")
    assert not torch.equal(found, loaded.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True))


def test_what_the_caller_asks_of_the_model_is_the_stock_models_to_do(tmp_path) -> None:
    model, _ = made(dtype=torch.bfloat16)
    fallow.export(model, tmp_path / "out", to="fallow")
    for dtype in (torch.float32, "auto", "float32", torch.float16):
        loaded = load(tmp_path / "out", dtype=dtype)
        wanted = {"auto": torch.bfloat16, "float32": torch.float32}.get(dtype, dtype)
        assert loaded.dtype == loaded.config.dtype == wanted
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
        assert agreement(logits(model), logits(loaded)).error < 0.05
    eager, notes = load(tmp_path / "out", attn_implementation="eager", use_cache=True, output_loading_info=True)
    assert eager.config._attn_implementation == "eager" and eager.config.use_cache is True
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    placed = load(tmp_path / "out", device_map="cpu")
    assert agreement(logits(eager), logits(placed)).top1 > 0.95
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.get_text_config().to_dict() == placed.config.to_dict() | {
        "dtype": config.text_config.to_dict()["dtype"]
    }
    with pytest.raises(ConfigError, match="a config alone makes none"):
        AutoModelForCausalLM.from_config(config)


def test_a_subnormal_weight_in_float16_is_no_other_model(tmp_path) -> None:
    model, handle = made(dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-6)
    handle.set_mode("sparse")
    for int8 in (False, True):
        fallow.export(model, tmp_path / f"{int8}", to="fallow", int8=int8)
        loaded = load(tmp_path / f"{int8}", dtype=torch.float16)
        assert loaded.dtype == torch.float16 and bool(logits(loaded, tokens=4).isfinite().all())


def test_predictors_that_were_never_started_are_started(tmp_path) -> None:
    model = tiny_model("llama").eval()
    fallow.sparsify(model, Upcycle(**SMALL))
    fallow.export(model, tmp_path / "out", to="fallow", int8=True)
    assert all(x.predictor.started for x in load(tmp_path / "out")._fallow.layers)


def test_what_only_training_reads_is_left_behind(tmp_path) -> None:
    model, _ = made(distill=0.5, hidden_loss=1.0, anneal=0.5, fit_tokens=100)
    fallow.export(model, tmp_path / "out", to="fallow")
    ours = load(tmp_path / "out")._fallow
    assert ours.objective.parent is None and ours.config == Upcycle(**SMALL, predictor="bilinear", rank=16)


def test_a_fresh_interpreter_in_either_order(tmp_path) -> None:
    model, _ = made()
    tokenizer = byte_level()
    fallow.export(model, tmp_path / "out", to="fallow", tokenizer=tokenizer)
    first = (
        "import sys, fallow\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "from transformers import AutoTokenizer, AutoModelForCausalLM\n"
        "print(AutoTokenizer.from_pretrained(sys.argv[1])('the fox').input_ids)\n"
        "print(AutoModelForCausalLM.from_pretrained(sys.argv[1])._fallow.mode)"
    )
    assert python(first, tmp_path / "out").splitlines() == [str(tokenizer("the fox").input_ids), "sparse"]
    last = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as e:\n    print('fallow_upcycle' in str(e))\n"
        "import fallow\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    assert python(last, tmp_path / "out").splitlines() == ["True", "LlamaForCausalLM"]


def test_the_tokenizer_is_found(tmp_path) -> None:
    tokenizer = byte_level()
    model, _ = made(model={"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0})
    done = fallow.export(model, tmp_path / "out", to="fallow", tokenizer=tokenizer)
    assert any("AutoTokenizer finds" in line for line in done.verified)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n\treturn 'ä' * 13"
    assert found(text).input_ids == tokenizer(text).input_ids and found.eos_token == tokenizer.eos_token
    said = pipeline("text-generation", model=str(tmp_path / "out"))("the quick", max_new_tokens=3, do_sample=False)
    assert said[0]["generated_text"].startswith("the quick")


# -- int8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_int8_is_what_decoding_reads(tmp_path, family, monkeypatch) -> None:
    model, handle = made(family, torch.bfloat16)
    plain = fallow.export(model, tmp_path / "plain", to="fallow")
    done = fallow.export(model, tmp_path / "out", to="fallow", int8=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    ffn = [n for n in stored if ".mlp." in n]
    assert {n.rpartition(".")[2] for n in ffn} == {"codes", "scale"}
    rows = sum(stored[n].shape[0] for n in ffn if n.endswith("codes"))
    weights = sum(stored[n].numel() for n in ffn if n.endswith("codes"))
    assert sum(stored[n].nbytes for n in ffn) == weights + 4 * rows
    assert plain.weight_bytes - done.weight_bytes == pytest.approx(weights - 4 * rows, abs=1024)
    assert "before rounding: loss" in done.verified[-1] and "nats" in done.verified[-1]
    loaded, seen = load(tmp_path / "out"), []
    real = layers.bank_ffn.bank_ffn

    def spy(x, predictor, *weights, **kwargs):
        seen.append(weights)
        return real(x, predictor, *weights, **kwargs)

    monkeypatch.setattr(layers.bank_ffn, "bank_ffn", spy)
    few = logits(loaded, tokens=1)
    assert len(seen) == len(handle.layers) and all(isinstance(w, Int8Rows) for each in seen for w in each)
    whole = {n: stored[n].float() * stored[n.replace("codes", "scale")][:, None] for n in ffn if n.endswith("codes")}
    with torch.no_grad():  # the same weights as floats, in the model in hand
        for name, tensor in whole.items():
            weight = model.get_parameter(name.replace("codes", "weight"))
            weight.copy_(tensor.t() if "down" in name else tensor)
    handle.set_mode("sparse")
    assert agreement(logits(model, tokens=1), few).error < 0.02
    assert agreement(logits(model), logits(loaded)).top1 > 0.95
    assert agreement(logits(model, "dense"), logits(loaded, "dense")).error < 0.02


def massive() -> tuple[PreTrainedModel, UpcycleMethod]:
    """A channel of layer 1 writes one number that dwarfs the rest of its row; the labels are what the model says."""
    model = tiny_model("llama").eval()
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[5] *= 10
        mlp.up_proj.weight[5] *= 10
        mlp.down_proj.weight[3, 5] = 5.0
        model.lm_head.weight[:, 3] = 0.0
        model.lm_head.weight *= 50
        ids_BT = tiny_batch(seed=3, batch=4, tokens=64)["input_ids"]
        labels_BT = model(input_ids=ids_BT).logits.argmax(-1).roll(1, 1)
    handle = fallow.sparsify(model, Upcycle(**SMALL))
    handle.watch({"input_ids": ids_BT, "labels": labels_BT})
    handle.set_mode("sparse")
    return model, handle


def test_a_layer_that_int8_harms_stays_as_it_is(tmp_path) -> None:
    model, _ = massive()
    done = fallow.export(model, tmp_path / "out", to="fallow", int8=True)
    assert any(line.startswith("layer 1 stays in float32: in int8 it alone costs +") for line in done.verified)
    loaded = load(tmp_path / "out")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, Int8Linear)
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert agreement(logits(model, "dense"), logits(loaded, "dense")).top1 > 0.95


def test_without_watched_text_no_layer_is_tried(tmp_path) -> None:
    model, handle = massive()
    handle.watched.batch = None
    done = fallow.export(model, tmp_path / "out", to="fallow", int8=True)
    assert isinstance(load(tmp_path / "out").model.layers[1].mlp.up_proj, Int8Linear)
    assert "no text being watched" in done.verified[-1]


def test_an_int8_model_moves_and_becomes_stock_again(tmp_path) -> None:
    model, _ = made()
    fallow.export(model, tmp_path / "out", to="fallow", int8=True)
    loaded = load(tmp_path / "out")
    part = next(m for m in loaded.modules() if isinstance(m, Int8Linear))
    scale, before = part.scale.clone(), logits(loaded)
    loaded.to(torch.bfloat16)
    loaded._fallow.set_mode("sparse")
    assert torch.equal(part.scale, scale) and part.weight.dtype == torch.bfloat16 and part.codes.dtype == torch.int8
    assert agreement(before, logits(loaded)).error < 0.1
    loaded = load(tmp_path / "out")
    with pytest.raises(ConfigError, match="in int8 already; copy its folder"):
        fallow.export(loaded, tmp_path / "again", to="fallow")
    done = fallow.export(loaded, tmp_path / "hf", to="hf")
    assert done.dense_bytes == sum(p.nbytes for p in model.parameters())
    stock = load(tmp_path / "hf")
    assert getattr(stock, "_fallow", None) is None
    wanted = {w.name: w.parameter for x in loaded._fallow.layers for w in x.view.parameters_along_channels()}
    assert all(torch.equal(stock.get_parameter(n), w) for n, w in wanted.items()) and len(wanted) == 6
    assert agreement(logits(loaded, "dense"), stock(input_ids=probe(128)).logits.detach()).error < 1e-4


def test_the_dense_companion_is_stock(tmp_path) -> None:
    model, handle = made(dtype=torch.bfloat16)
    logits(model, tokens=1)  # re-lays the down projections
    assert not model.model.layers[0].mlp.down_proj.weight.is_contiguous()
    done = fallow.export(model, tmp_path / "out", to="hf")
    assert "bit for bit" in done.verified[0]
    stock = load(tmp_path / "out", dtype=torch.float32)
    reached = agreement(logits(model.float(), "dense"), stock(input_ids=probe(128)).logits.detach())
    assert type(stock) is type(model) and reached.top1 > 0.97 and reached.error < 0.02
    assert handle.mode == "sparse"
