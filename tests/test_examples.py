"""Both programs in examples/, run as a reader would run them, on a tiny random model with a tokenizer of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on . " * 60
STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` (a random two-layer Llama and a word tokenizer) and `text.txt`."""
    folder = tmp_path_factory.mktemp("example")
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(example: str, inputs: Path, out: Path) -> str:
    flags = f"--omit 0.5 --steps {STEPS} --batch 4 --length 32 --lr 1e-2".split()
    command = [sys.executable, str(EXAMPLES / example), *flags, "--out", str(out)]
    command += ["--model", str(inputs / "model"), "--text", str(inputs / "text.txt")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def loss_of(folder: Path, text: str) -> float:
    """Loss of a saved model, loaded by stock transformers, on the words of `text`."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids_BT = PreTrainedTokenizerFast.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids_BT, labels=ids_BT).loss.item()


def check_learned(inputs: Path, out: Path) -> None:
    words = " ".join(TEXT.split()[:32])
    before, after = loss_of(inputs / "model", words), loss_of(out, words)
    assert after < 0.5 * before, f"loss {before:.2f} -> {after:.2f}"


def test_loop_by_hand_is_sparse_ends_dense_and_learns(inputs: Path, tmp_path: Path) -> None:
    said = run("train_by_hand.py", inputs, tmp_path / "out")
    omitted = [int(percent) for percent in re.findall(r"omitted (\d+)%", said)]
    assert omitted[0] == 50 and omitted[-1] == 0
    check_learned(inputs, tmp_path / "out")


def test_trainer_with_callback_learns(inputs: Path, tmp_path: Path) -> None:
    said = run("trainer_callback.py", inputs, tmp_path / "out")
    assert f"saved a plain Hugging Face model to {tmp_path / 'out'}" in said
    check_learned(inputs, tmp_path / "out")
