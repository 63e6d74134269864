"""A packed folder that is corrupt, cut, incomplete or of another version is refused, file and tensor named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import fallow
from fallow import SMET
from fallow.errors import CheckpointError
from fallow.exporting import packed


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exports") / "good"
    model = tiny_model("llama")
    fallow.sparsify(model, SMET(density=0.25, structure="unstructured"))
    fallow.export(model, path, to="packed")
    return path


LAYER = "model.layers.0.mlp.up_proj"


def flip_a_bit(tensors):
    tensors[f"{LAYER}.bitmap"][0, 0] ^= 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (flip_a_bit, rf"packed\.safetensors: {LAYER}\.values is .* but .* marks"),
        (lambda t: t.pop(f"{LAYER}.values"), rf"packed\.safetensors: {LAYER}\.values is missing"),
        (lambda t: t.pop(f"{LAYER}.bitmap"), rf"packed\.safetensors: {LAYER}\.bitmap is missing"),
        (lambda t: t.pop("model.norm.weight"), r"packed\.safetensors: model\.norm\.weight is missing"),
        (lambda t: t.update({f"{LAYER}.bitmap": t[f"{LAYER}.bitmap"][:-1].clone()}), rf"{LAYER}\.bitmap has 63 rows"),
        (lambda t: t.update({f"{LAYER}.bitmap": t[f"{LAYER}.bitmap"].int()}), rf"{LAYER}\.bitmap: wanted uint8"),
        (lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"].view(2, -1)}), rf"{LAYER}\.values is"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model\.norm\.weight is \(7,\), .* \(32,\)"),
        (lambda t: t.update({"stray": torch.ones(7)}), r"packed\.safetensors: stray does not belong"),
    ],
)
def test_a_corrupt_tensor_is_named(good, tmp_path, change, match) -> None:
    tensors = load_file(good / packed.WEIGHTS)
    change(tensors)
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / packed.WEIGHTS)
    with pytest.raises(CheckpointError, match=match):
        fallow.load_packed(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i: i.update(format=2), r"fallow-packed\.json is of format 2, this fallow reads 1"),
        (lambda i: i.pop("layers"), r"fallow-packed\.json is corrupt"),
        (lambda i: i.update(dtype="bf17"), r"fallow-packed\.json is corrupt"),
        (lambda i: i["layers"][LAYER].update(shape=[64]), r"fallow-packed\.json is corrupt"),
        (lambda i: i["layers"][LAYER].update(shape=[64, 31]), "bits are set beyond|marks"),
        (lambda i: i["layers"][LAYER].update(shape=[63, 32]), "has 64 rows"),
        (lambda i: i["layers"][LAYER].update(transposed=True), r"up_proj\.weight is \(32, 64\), .* \(64, 32\)"),
        (lambda i: i["tied"].update({"lm_head.weight": "nothing"}), "lm_head.weight does not belong"),
    ],
)
def test_a_corrupt_index_is_named(good, tmp_path, change, match) -> None:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((good / packed.INDEX).read_text())
    change(index)
    (tmp_path / packed.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=match):
        fallow.load_packed(tmp_path)


@pytest.mark.parametrize("name", [packed.INDEX, packed.WEIGHTS, "config.json"])
def test_a_missing_or_cut_file_is_named(good, tmp_path, name) -> None:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes((good / name).read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=f"{name} is .*corrupt"):
        fallow.load_packed(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        fallow.load_packed(tmp_path)


def test_stock_transformers_refuses_a_packed_folder(good) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):  # rather than draw the missing weights at random
        AutoModelForCausalLM.from_pretrained(good)
