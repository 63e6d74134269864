"""Experts exported to stock MoE engines answer as the training-time sparse forward does, or nothing is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.tiny_models import tiny_batch, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import fallow
from fallow import SSD
from fallow.errors import CheckpointError, ConfigError, UnsupportedModelError
from fallow.exporting import TARGETS, moe
from fallow.exporting.agreement import agreement, probe

ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = [
    ("llama", {}, "mixtral"),
    (
        "llama",
        {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-2},
        "mixtral",
    ),
    ("mistral", {"sliding_window": 16}, "mixtral"),
    ("arcee", {"hidden_act": "relu2"}, "mixtral"),
    ("llama", {"attention_bias": True}, "granitemoe"),
    ("qwen2", {}, "granitemoe"),
    ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 3.0}, "granitemoe"),
    ("qwen3", {}, "qwen3_moe"),
    ("qwen3", ONE_HEAD, "olmoe"),
    ("olmo2", {}, "flex_olmo"),
]


def made(family: str = "llama", dtype: torch.dtype = torch.float32, *, experts: int = 8, active=2, **changes):
    model = tiny_model(family, dtype=dtype, **({"hidden_act": "relu"} | changes))
    return model, fallow.sparsify(model, SSD(experts=experts, active=active))


@torch.no_grad()
def sparse_logits(model) -> torch.Tensor:
    model.eval()
    with model._fallow.in_mode("sparse"):
        return model(input_ids=probe(128)).logits


@torch.no_grad()
def stock_logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(input_ids=probe(128)).logits


@pytest.mark.parametrize("active", [2, 3])
@pytest.mark.parametrize(("family", "changes", "to"), CASES)
def test_the_stock_engine_answers_as_the_sparse_forward(tmp_path, family, changes, to, active) -> None:
    model, _ = made(family, active=active, **changes)
    done = fallow.export(model, tmp_path / "out", to=to)
    assert done.to == to and "top-1 agreement" in done.verified[0]
    reached = agreement(sparse_logits(model), stock_logits(tmp_path / "out"))
    assert reached.top1 >= 0.995 and reached.error <= 0.002, reached
    with torch.no_grad(), model._fallow.in_mode("dense"):  # and the experts that were left out do matter
        dense = agreement(model(input_ids=probe(128)).logits, sparse_logits(model))
    assert dense.top1 < 0.95 and dense.error > 0.05, dense
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == to and config.num_experts_per_tok == active and config.hidden_act == "silu"
    assert config.rope_parameters == model.config.rope_parameters
    assert config.rms_norm_eps == model.config.rms_norm_eps


@pytest.mark.parametrize(("to", "wanted"), [("mixtral", 0.01), ("granitemoe", 0.01)])
def test_experts_without_the_folding_are_another_model(tmp_path, monkeypatch, to, wanted) -> None:
    """The check can fail: each step of the folding left out is noticed, and nothing is kept."""
    fold = moe.fold
    undone = {
        "the router's scale": lambda x, f: f._replace(router_ED=x.router.detach()),
        "the factor on down": lambda x, f: f._replace(down_EDC=f.down_EDC / x.active),
        "the scale of the gate": lambda x, f: f._replace(gate_ECD=f.gate_ECD / moe._GATE_SCALE),
        "the permutation": lambda x, f: f._replace(router_ED=f.router_ED.flip(0)),
        "all of it": lambda x, f: f._replace(
            router_ED=x.router.detach(),
            gate_ECD=f.gate_ECD / moe._GATE_SCALE,
            up_ECD=f.up_ECD * moe._GATE_SCALE**0.5,
            down_EDC=f.down_EDC * moe._GATE_SCALE**0.5 / x.active,
        ),
    }
    for what, change in undone.items():
        monkeypatch.setattr(moe, "fold", lambda layer, weighting, c=change: c(layer, fold(layer, weighting)))
        model, _ = made()
        with pytest.raises(CheckpointError, match=r"does not answer as the training-time forward.*nothing was written"):
            fallow.export(model, tmp_path / "out", to=to)
        assert os.listdir(tmp_path) == [], what


def test_a_wrong_config_is_noticed(tmp_path, monkeypatch) -> None:
    build = moe.stock_config
    for field, value, match in (
        ("rms_norm_eps", 0.3, "does not answer"),
        ("num_experts_per_tok", 1, "does not answer"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 50.0}, "inv_freq .* differs"),
    ):

        def changed(*args, field=field, value=value):
            config = build(*args)
            setattr(config, field, value)
            return config

        monkeypatch.setattr(moe, "stock_config", changed)
        model, _ = made()
        with pytest.raises(CheckpointError, match=match):
            fallow.export(model, tmp_path / "out", to="mixtral")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["mixtral", "granitemoe"])
def test_16_bit_weights_are_as_near_as_16_bits_are(tmp_path, dtype, to) -> None:
    model, handle = made(dtype=dtype, active=4)
    done = fallow.export(model, tmp_path / "out", to=to)
    assert len(done.verified) == 2 and "against itself in float32" in done.verified[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == dtype
    with torch.no_grad(), handle.in_mode("sparse"):
        ids = probe(128)
        model.eval()
        wanted = model(input_ids=ids).logits.float()
        own = agreement(wanted, AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits)
        reached = agreement(wanted, loaded(ids).logits.float())
    assert reached.top1 > 0.9 and reached.error < 0.05, (reached, own)
    # factors of 4, 2^10 (2^8) and 2^-5 (2^-4) only shift exponents
    layer = handle.experts()[0]
    folded = moe.fold(layer, "renormalised")
    scale = moe._GATE_SCALE_FP16 if dtype == torch.float16 else moe._GATE_SCALE
    gate, up, down = (x.reshape(-1) for x in layer.view.weights()[:3])
    assert torch.equal(folded.gate_ECD.reshape(-1).float() / scale, gate.float())
    if dtype == torch.bfloat16:
        assert torch.equal(folded.up_ECD.reshape(-1).float() * scale**0.5, up.float())
    back = folded.down_EDC.transpose(0, 1).reshape(-1).float() * scale**0.5 / 4
    assert torch.allclose(back, down.float(), rtol=2**-10, atol=2e-7)


def test_the_model_is_left_as_it_is(tmp_path) -> None:
    model, handle = made()
    handle.experts()
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    rng = torch.get_rng_state()
    with torch.no_grad():
        model.eval()
        dense = model(**tiny_batch()).logits
        model.train()
    fallow.export(model, tmp_path / "out", to="mixtral")
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training and model._fallow is handle
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    with torch.no_grad():
        model.eval()
        assert torch.equal(dense, model(**tiny_batch()).logits)  # evaluation is dense still


def test_a_trained_dense_model_becomes_a_mixtral_without_training(tmp_path) -> None:
    """MoEfication: with all experts active the Mixtral is the dense model; with a quarter it is its sparse form."""
    model = tiny_model("llama", hidden_act="relu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(20):
        model(**tiny_batch(seed=step % 4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        dense = model(input_ids=probe(128)).logits
    handle = fallow.sparsify(model, SSD(experts=8, active=8))
    fallow.export(model, tmp_path / "all", to="mixtral")
    whole = agreement(dense, stock_logits(tmp_path / "all"))
    assert whole.top1 >= 0.995 and whole.error <= 0.002, whole
    fallow.sparsify(handle.remove(), SSD(experts=8, active=2))
    fallow.export(model, tmp_path / "quarter", to="mixtral")
    quarter = agreement(sparse_logits(model), stock_logits(tmp_path / "quarter"))
    assert quarter.top1 >= 0.995 and quarter.error <= 0.002, quarter


def test_a_silu_model_needs_no_scale_of_its_gate(tmp_path) -> None:
    model = tiny_model("llama")
    fallow.sparsify(model, SSD(experts=8, active=2, relu="ignore"))
    fallow.export(model, tmp_path / "out", to="mixtral")
    gate = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.experts.gate_up_proj[0, :8]
    assert torch.equal(gate, model._fallow.experts()[0].view.weights().w_gate_FD[:8])


@pytest.mark.parametrize(
    ("family", "changes", "to", "match"),
    [
        ("llama", {"attention_bias": True}, "mixtral", r"mixtral cannot express biases in attention \(model.*q_proj"),
        ("llama", {"mlp_bias": True}, "granitemoe", r"biases in the FFN \(model\.layers\.0\.mlp\)"),
        ("llama", {}, "olmoe", "olmoe always has norms of queries and keys over all heads, which this llama"),
        ("llama", {}, "qwen3_moe", "always has norms of queries and keys per head"),
        ("qwen3", {}, "mixtral", "cannot express norms of queries and keys per head of this qwen3 model"),
        ("qwen3", ONE_HEAD | {"head_dim": 16}, "olmoe", "head_dim 16, not hidden_size"),
        ("olmo2", {}, "olmoe", "norms after attention and FFN instead of before"),
        ("mistral", {"sliding_window": 16}, "granitemoe", r"sliding_window 16"),
        ("granite", {}, "mixtral", r"residual_multiplier 0\.5"),
        ("gemma2", {"hidden_activation": "relu"}, "mixtral", "gemma2 has norms before and after .* soft-capped logits"),
        ("smollm3", {}, "mixtral", "layers without rope"),
        ("opt", {"activation_function": "relu"}, "mixtral", "learned positions"),
        ("arcee", {}, "mixtral", "mlp is plain with relu, which cannot be folded"),
    ],
)
def test_what_an_engine_cannot_express_is_named(tmp_path, family, changes, to, match) -> None:
    model, _ = made(family, **changes)
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        fallow.export(model, tmp_path / "out", to=to)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def test_without_one_set_of_experts_there_is_nothing_to_export(tmp_path) -> None:
    for model in (tiny_model("llama"), fallow.sparsify(tiny_model("llama"), fallow.SMET()).model):
        with pytest.raises(ConfigError, match="mixtral needs experts and this model has none; train with method ssd"):
            fallow.export(model, tmp_path / "out", to="mixtral")
    model, _ = made(active=(2, 3))
    with pytest.raises(ConfigError, match=r"\(8, 2, 64\), \(8, 3, 64\)"):
        fallow.export(model, tmp_path / "out", to="mixtral")
    with pytest.raises(ConfigError, match="unknown target 'dbrx'"):
        fallow.export(model, tmp_path / "out", to="dbrx")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_every_target_is_a_module_and_a_case() -> None:
    assert {to for *_, to in CASES} | {"hf", "packed", "gguf", "gguf_f32", "fallow"} == set(TARGETS)


def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path) -> None:
    """SIGKILL while the engine is loaded for the comparison: no folder; the next export succeeds and cleans up."""
    script = """
import os, signal, sys
import torch
from pathlib import Path
from tests.tiny_models import tiny_model
import fallow
from fallow.exporting import moe
moe.refuse_odd_keys = lambda notes: os.kill(os.getpid(), signal.SIGKILL)
model = tiny_model("llama", hidden_act="relu")
fallow.sparsify(model, fallow.SSD(experts=8, active=2))
fallow.export(model, Path(sys.argv[1]) / "out", to="mixtral")
"""
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, cwd=root, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    assert os.listdir(tmp_path) == [".partial-out"]
    model, _ = made()
    fallow.export(model, tmp_path / "out", to="mixtral")
    assert os.listdir(tmp_path) == ["out"]
    weights = json.loads((tmp_path / "out" / "config.json").read_text())
    assert weights["architectures"] == ["MixtralForCausalLM"] and weights["num_local_experts"] == 8
