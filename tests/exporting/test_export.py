"""Exports load as the model they came from, and appear whole or not at all."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import FAMILIES, tiny_batch, tiny_model
from transformers import AutoModelForCausalLM

import fallow
from fallow import SAT, SMET
from fallow.errors import CheckpointError, ConfigError, UnsupportedModelError
from fallow.exporting import hf, packed, stock

CASES = [
    ("llama", {"structure": "fan_in"}, torch.float32),
    ("llama", {"structure": "unstructured"}, torch.bfloat16),
    ("gpt2", {"structure": "unstructured"}, torch.float32),
    ("opt", {"structure": "fan_in"}, torch.bfloat16),
    ("gemma2", {"structure": "fan_in"}, torch.bfloat16),
    ("llama", {"block": 16}, torch.float32),
    ("gpt2", {"block": 16}, torch.bfloat16),
]


def made(family: str = "llama", dtype: torch.dtype = torch.float32, **settings):
    model = tiny_model(family, dtype=dtype)
    return model, fallow.sparsify(model, SMET(**({"density": 0.25, "update_every": 2} | settings)))


def read(path: Path, to: str):
    return fallow.load_packed(path) if to == "packed" else AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def edit(file: Path, change) -> None:
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("to", ["hf", "packed"])
@pytest.mark.parametrize(("family", "settings", "dtype"), CASES)
def test_a_wrapped_model_comes_back_as_the_stock_model(tmp_path, family, settings, dtype, to) -> None:
    model, handle = made(family, dtype, **settings)
    state = torch.get_rng_state()
    done = fallow.export(model, tmp_path / "out", to=to)
    assert torch.equal(state, torch.get_rng_state())
    assert model._fallow is handle and model.training and all(m.training for m in model.modules())
    loaded = read(tmp_path / "out", to)
    assert (done.packed_layers == len(handle.layers)) if to == "packed" else done.packed_layers == 0
    assert str(len(loaded.state_dict())) in done.verified[0]
    wanted = handle.remove()
    assert type(loaded) is type(wanted) and loaded.dtype == dtype and not loaded.training
    found = loaded.state_dict()
    assert found.keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
    ids = tiny_batch()["input_ids"]
    wanted.save_pretrained(tmp_path / "stock")  # loaded, because `.to(bfloat16)` rounds the rotary frequencies too
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype="auto")
    with torch.no_grad():
        assert torch.equal(reference(input_ids=ids).logits, loaded(input_ids=ids).logits)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == bool(loaded.config.tie_word_embeddings)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_packed(tmp_path, family) -> None:
    model, _ = made(family)
    fallow.export(model, tmp_path / "out", to="packed")


@pytest.mark.parametrize("to", ["hf", "packed"])
def test_a_wrapped_model_trains_on_as_if_nothing_had_happened(tmp_path, to) -> None:
    def losses(exported: bool) -> list[float]:
        model, handle = made()
        optimizer, found = handle.optimizer(lr=1e-2), []
        for step in range(4):
            if exported and step == 2:
                fallow.export(model, tmp_path / to, to=to)
            handle.before_step(step, 4)
            loss = model(**tiny_batch(seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.after_step(step, 4)
            found.append(float(loss.detach()))
        return found

    assert losses(True) == losses(False)


@pytest.mark.parametrize("to", ["hf", "packed"])
def test_a_model_under_sat_keeps_its_mode(tmp_path, to) -> None:
    model = tiny_model("llama")
    handle = fallow.sparsify(model, SAT())
    handle.set_mode("sparse")
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    fallow.export(model, tmp_path / "out", to=to)
    assert handle.mode == "sparse" and before == [m.training for m in model.modules()]
    for name, tensor in read(tmp_path / "out", to).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_removed_model_with_zeros_is_packed_and_a_dense_one_is_not(tmp_path) -> None:
    model, handle = made("llama", torch.bfloat16, density=0.1)
    wrapped = fallow.export(model, tmp_path / "wrapped", to="packed")
    removed = handle.remove()
    again = fallow.export(removed, tmp_path / "removed", to="packed")
    assert again.packed_layers == wrapped.packed_layers == 14 and again.weight_bytes == wrapped.weight_bytes
    dense = fallow.export(tiny_model("llama"), tmp_path / "dense", to="packed")
    assert dense.packed_layers == 0 and dense.weight_bytes >= dense.dense_bytes
    assert fallow.load_packed(tmp_path / "dense").dtype == torch.float32


def test_bytes_are_those_of_the_values_and_one_bit_a_weight(tmp_path) -> None:
    model, _ = made("llama", torch.bfloat16, density=0.1)
    done = fallow.export(model, tmp_path / "out", to="packed")
    stored = load_file(tmp_path / "out" / packed.WEIGHTS)
    layers = {n.removesuffix(".values") for n in stored if n.endswith(".values")}
    sparse = sum(stored[f"{n}.{part}"].nbytes for n in layers for part in ("values", "bitmap"))
    weights = sum(stored[f"{n}.bitmap"].numel() * 8 for n in layers)
    assert abs(sparse - weights * (2 * 0.1 + 1 / 8)) < 0.02 * 2 * weights  # rounded to whole weights a row
    assert done.weight_bytes == (tmp_path / "out" / packed.WEIGHTS).stat().st_size
    assert done.weight_bytes < sum(t.nbytes for t in stored.values()) + 8192
    assert done.dense_bytes == sum(p.nbytes for p in tiny_model("llama", dtype=torch.bfloat16).parameters())
    assert sum(done.files.values()) == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert done.as_dict()["ratio"] == done.ratio == done.weight_bytes / done.dense_bytes
    json.dumps(done.as_dict())


def test_negative_zeros_are_dropped_and_other_dtypes_kept(tmp_path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.mul_(torch.arange(weight.numel()).view_as(weight) % 8 == 0)  # leaves -0 where it was negative
    model.model.norm.float()
    done = fallow.export(model, tmp_path / "out", to="packed")
    assert done.packed_layers == 1
    assert load_file(tmp_path / "out" / packed.WEIGHTS)["model.layers.0.mlp.up_proj.values"].numel() == 64 * 32 // 8
    loaded = fallow.load_packed(tmp_path / "out")
    assert loaded.model.norm.weight.dtype == torch.float32 and loaded.dtype == torch.bfloat16


def test_same_bits_sees_one_bit_and_no_sign_of_zero() -> None:
    x = torch.tensor([0.0, 1.0, float("nan")])
    assert stock.same_bits(x, torch.tensor([-0.0, 1.0, float("nan")]))
    assert not stock.same_bits(x, torch.tensor([0.0, 1.0000001, float("nan")]))
    assert not stock.same_bits(x, x[:2])


# -- what appears on the disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "packed"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
def test_a_failing_writer_leaves_nothing_and_the_old_export_as_it_was(tmp_path, monkeypatch, to, error) -> None:
    model, _ = made()
    target = tmp_path / "deep" / "out"
    target.parent.mkdir()
    fallow.export(model, target, to=to)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(*((hf, "save") if to == "hf" else (packed, "save_file")), fail)
    kind = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind, match="No space left on device.*free some space" if kind is CheckpointError else None):
        fallow.export(model, target, to=to, overwrite=True)
    with pytest.raises(kind):
        fallow.export(model, tmp_path / "new", to=to)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert os.listdir(tmp_path) == ["deep"] and os.listdir(target.parent) == ["out"]
    assert model.training


def test_an_interruption_between_the_renames_keeps_the_old_export(tmp_path, monkeypatch) -> None:
    model, _ = made()
    fallow.export(model, tmp_path / "out", to="packed")
    (tmp_path / "out" / "note").write_text("old")
    rename = Path.rename

    def stop(self, to):
        if self.name.startswith(".partial-"):
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        fallow.export(model, tmp_path / "out", to="packed", overwrite=True)
    assert (tmp_path / "out" / "note").read_text() == "old" and hidden(tmp_path) == []


def test_what_killed_exports_left_is_put_back_or_removed(tmp_path) -> None:
    model, _ = made()
    fallow.export(model, tmp_path / "out", to="packed")
    (tmp_path / "out").rename(tmp_path / ".replaced-out")
    (tmp_path / ".partial-out").mkdir()
    (tmp_path / ".partial-out" / "half").write_text("x")
    with pytest.raises(ConfigError, match="holds files already"):
        fallow.export(model, tmp_path / "out", to="packed")
    fallow.load_packed(tmp_path / "out")
    fallow.export(model, tmp_path / "out", to="packed", overwrite=True)
    assert hidden(tmp_path) == [] and not (tmp_path / "out" / "half").exists()


def test_overwrite_replaces_an_export_and_nothing_else(tmp_path) -> None:
    model, _ = made()
    (tmp_path / "out").mkdir()
    fallow.export(model, tmp_path / "out", to="hf")  # an empty folder is fine
    with pytest.raises(ConfigError, match="holds files already; choose another folder, or overwrite"):
        fallow.export(model, tmp_path / "out", to="packed")
    fallow.export(model, tmp_path / "out", to="packed", overwrite=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="no earlier export"):
        fallow.export(model, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        fallow.export(model, tmp_path / "file", overwrite=True)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_bad_use_names_the_mend(tmp_path) -> None:
    model, handle = made()
    with pytest.raises(ConfigError, match="unknown target 'onnx'; targets: hf, packed, fallow, mixtral"):
        fallow.export(model, tmp_path / "out", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"not a SMETMethod; a handle has it as \.model"):
        fallow.export(handle, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no language-model head"):
        fallow.export(tiny_model("llama").model, tmp_path / "out")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"extra\.bias is in this model"):
        fallow.export(model, tmp_path / "out", to="packed")
    with pytest.raises(CheckpointError, match=r"unexpected keys .*extra\.bias"):
        fallow.export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_what_reads_back_differently_is_not_kept(tmp_path, monkeypatch) -> None:
    model, _ = made()
    save = hf.save

    def damaged(model, folder, state):
        state = {n: t.clone() for n, t in state.items()}
        state["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
        save(model, folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save", damaged)
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight differs"):
            fallow.export(model, tmp_path / "out")

    def other_config(changed, model, folder, state):
        save(model, folder, state)
        edit(folder / "config.json", lambda c: c.update(changed))

    for changed, match in (
        ({"rms_norm_eps": 0.5}, r"logits .* differ from the model's .* more than the rounding"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, r"inv_freq of the folder .* differs"),
    ):
        monkeypatch.setattr(hf, "save", partial(other_config, changed))
        with pytest.raises(CheckpointError, match=match):
            fallow.export(model, tmp_path / "out")

    def other_norms(state, file, **_):
        save_file({name: t + 1 if "norm" in name else t for name, t in state.items()}, file)

    monkeypatch.setattr(packed, "save_file", other_norms)
    with pytest.raises(CheckpointError, match=r"norm\.weight differs"):
        fallow.export(model, tmp_path / "out", to="packed")
    assert os.listdir(tmp_path) == []
