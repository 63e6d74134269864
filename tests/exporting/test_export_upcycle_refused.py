"""`--to fallow`: damaged folders, what cannot be written, and exports that differ or stop half-way leave nothing."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.exporting.upcycled_folders import SMALL, edit, load, made
from tests.tiny_models import tiny_model

import fallow
from fallow.errors import CheckpointError, ConfigError, UnsupportedModelError
from fallow.exporting import fallow as target
from fallow.exporting.stock import load_folder
from fallow.exporting.upcycled import PREDICTORS


def test_predictors_of_other_weights_are_refused(tmp_path) -> None:
    model, _ = made()
    for int8, name in ((False, "up_proj.weight"), (True, "up_proj.codes")):
        folder = tmp_path / str(int8)
        fallow.export(model, folder, to="fallow", int8=int8)
        weights = load_file(folder / "model.safetensors")
        weights[f"model.layers.1.mlp.{name}"] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="belong to other weights"):
            load(folder)
        with pytest.raises(CheckpointError, match="belong to other weights"):
            load_folder(folder)


def test_a_damaged_folder_says_what_is_wrong(tmp_path) -> None:
    model, _ = made()
    fallow.export(model, tmp_path / "out", to="fallow")
    config = tmp_path / "out" / "config.json"
    whole, predictors = config.read_text(), tmp_path / "out" / PREDICTORS
    edit(config, lambda c: c["fallow"].update(format=2))
    with pytest.raises(CheckpointError, match="format 2, this fallow reads 1"):
        load(tmp_path / "out")
    edit(config, lambda c: c.pop("fallow"))
    with pytest.raises(CheckpointError, match=r"config\.json .* corrupt"):
        load(tmp_path / "out")
    config.write_text(whole)
    edit(config, lambda c: c["text_config"].update(model_type="gpt9"))
    with pytest.raises(ConfigError, match="knows no model of type 'gpt9'"):
        load(tmp_path / "out")
    config.write_text(whole)
    predictors.write_bytes(predictors.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{PREDICTORS} is damaged .*export the model again"):
        load(tmp_path / "out")
    predictors.unlink()
    with pytest.raises(CheckpointError, match=f"holds no {PREDICTORS}"):
        load(tmp_path / "out")


def test_what_cannot_be_written_says_what_to_do(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"has none; train it with method upcycle, or .*fallow\.sparsify"):
        fallow.export(tiny_model("llama"), tmp_path / "out", to="fallow")
    grouped = tiny_model("llama", hidden_act="relu")
    fallow.sparsify(grouped, fallow.SSD(experts=8, active=2))
    with pytest.raises(ConfigError, match="held by ssd; export it to hf"):
        fallow.export(grouped, tmp_path / "out", to="fallow")
    model, handle = made()
    with pytest.raises(ConfigError, match="int8 is for fallow"):
        fallow.export(model, tmp_path / "out", to="hf", int8=True)
    for to in ("mixtral", "gguf", "flex_olmo"):
        with pytest.raises(UnsupportedModelError, match=f"{to} cannot express Upcycle's predictors.*export to fallow"):
            fallow.export(model, tmp_path / "out", to=to)
    handle.layers[1].selection = "oracle"
    with pytest.raises(ConfigError, match="selection='oracle' is a control"):
        fallow.export(model, tmp_path / "out", to="fallow")
    assert os.listdir(tmp_path) == []


def test_llama_cpp_takes_the_dense_companion(tmp_path) -> None:
    pytest.importorskip("gguf")
    model, handle = made()
    handle.set_mode("dense")
    assert fallow.export(model, tmp_path / "out", to="gguf").weight_bytes > 0


def test_what_reads_back_differently_is_not_kept(tmp_path, monkeypatch) -> None:
    model, _ = made()
    save, write = target.save, target.write_predictors

    def damaged(model, folder, state):
        state = {n: t.clone() for n, t in state.items()}
        state["model.layers.1.mlp.up_proj.codes"][0, 0] += 1
        save(model, folder, state)

    def shuffled(state, file):
        write(state | {"layer.1.tilt_F": state["layer.1.tilt_F"].flip(0) * torch.arange(64)}, file)

    def other_keep(handle):
        return {**SMALL, "predictor": "bilinear", "rank": 16, "gate": "hard", "bank": 32}

    for name, change, int8, match in (
        ("save", damaged, True, "belong to other weights"),
        ("write_predictors", shuffled, False, "does not answer as the training-time forward.*nothing was written"),
        ("settings_of", other_keep, False, "banks of 16, the config of"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, change)
            with pytest.raises(CheckpointError, match=match):
                fallow.export(model, tmp_path / "out", to="fallow", int8=int8)
        assert os.listdir(tmp_path) == [], name


def test_a_folder_that_decodes_otherwise_is_not_kept(tmp_path, monkeypatch) -> None:
    model, _ = made()
    read = target._load

    def other_packing(folder):
        loaded = read(folder)
        predictor = loaded._fallow.layers[1].predictor
        packed = predictor.packed
        predictor.packed = lambda w: packed(w)._replace(tilt_F=torch.arange(64.0))
        return loaded

    monkeypatch.setattr(target, "_load", other_packing)
    with pytest.raises(CheckpointError, match=r"layer 1 decodes otherwise than the model's.*nothing was written"):
        fallow.export(model, tmp_path / "out", to="fallow")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, error) -> None:
    model, handle = made()

    def fail(*args):
        raise error

    monkeypatch.setattr(target, "write_predictors", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        fallow.export(model, tmp_path / "out", to="fallow")
    assert os.listdir(tmp_path) == [] and handle.mode == "sparse"
