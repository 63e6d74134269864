"""Runs whose topology moves: killed and resumed, refused, carried to another number of ranks, and counted in bytes."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fallow
from fallow.cli.compare import compare_command
from fallow.errors import CheckpointError, ConfigError
from fallow.training import checkpoint
from fallow.training.progress import Display
from fallow.training.run import run
from fallow.training.settings import resolve
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model
from tests.training.test_resume import finish, start, wait_for_step, write
from tests.training.tiny_runs import settings

SMET = {"method": "smet", "density": 0.25, "update_every": 3}


def smet(root: Path, **changes: Any) -> dict[str, Any]:
    return settings(root, steps=12, save_every=4) | SMET | changes


def go(recipe: dict[str, Any]) -> dict[str, Any]:
    return run(resolve(recipe, {}), display=Display(silent=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").open()) if e["kind"] == kind]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {
            "precision": "bf16",
            "state_dtype": "bf16",
            "structure": "unstructured",
            "growth": "gradient",
            "accumulate": 2,
            "batch_size": 1,
        },
    ],
    ids=["paper", "bf16-state-gradient-growth"],
)
def test_killed_and_resumed_equals_never_killed(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Weights, bitmaps, ages and moments bit for bit, and the topology moves in the same steps."""
    common = smet(tmp_path, steps=60) | changes
    go(common | {"name": "whole"})
    cut = write(tmp_path / "cut.yaml", common | {"name": "cut"})
    process = start(cut)
    wait_for_step(tmp_path / "runs/cut/smet/metrics.jsonl", random.randint(5, 50), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "runs/cut/smet/run.json").read_text())["status"] == "running"
    assert "resuming   from checkpoint-" in finish(cut)
    whole, again = (tmp_path / "runs" / name / "smet" for name in ("whole", "cut"))
    last = max((whole / "checkpoints").glob("checkpoint-*"), key=checkpoint.step_of).name
    for file in ("model/model.safetensors", *(f"checkpoints/{last}/{f}.safetensors" for f in ("model", "sparsity"))):
        expected, found = load_file(whole / file), load_file(again / file)
        assert expected.keys() == found.keys()
        for name, weight in expected.items():
            assert torch.equal(weight, found[name]), (file, name)
    kept = load_file(whole / f"checkpoints/{last}/model.safetensors")
    assert sum(name.endswith(".bitmap") for name in kept) == 14
    assert load_file(whole / f"checkpoints/{last}/sparsity.safetensors")["update_steps"].tolist() == [*range(3, 57, 3)]
    states = [torch.load(r / "checkpoints" / last / "optimizer.pt")["state"] for r in (whole, again)]
    assert sum("age" in state for state in states[0].values()) == 14
    for key, state in states[0].items():
        assert state.keys() == states[1][key].keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])), (key, name)
    for kind in ("train", "eval", "layers"):
        for what in ("step", "loss", "density", "smet/updates"):
            expected, found = ([e.get(what) for e in lines(r, kind)] for r in (whole, again))
            assert expected == found, (kind, what)
    assert lines(again, "train")[-1]["smet/updates"] == 19, "the last of 60 steps does not move it"


def test_another_density_is_refused_and_nothing_is_overwritten(tmp_path: Path) -> None:
    go(smet(tmp_path, steps=4, save_every=2))
    folder = tmp_path / "runs/tiny/smet"
    for status in ("finished", "interrupted"):
        record = json.loads((folder / "run.json").read_text()) | {"status": status}
        (folder / "run.json").write_text(json.dumps(record))
        before = contents(folder)
        with pytest.raises(
            ConfigError, match=r"other settings \(.*0\.25.* there, .*0\.5.* now\).*--overwrite"
        ) as caught:
            go(smet(tmp_path, steps=4, save_every=2, density=0.5))
        assert "\n" not in str(caught.value) and contents(folder) == before
    cli = start(write(tmp_path / "r.yaml", smet(tmp_path, steps=4, save_every=2, density=0.5)))
    out, _ = cli.communicate(timeout=60)
    assert cli.returncode != 0 and len(re.findall(r"^fallow: error:", out, re.M)) == 1 and "Traceback" not in out


def test_a_corrupt_bitmap_is_refused(tmp_path: Path) -> None:
    """Bits flipped in a checkpoint whose manifest says that it is whole: the topology's own check finds them."""
    go(smet(tmp_path))
    folder = tmp_path / "runs/tiny/smet"
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    newest = folder / "checkpoints/checkpoint-8"
    stored = load_file(newest / "model.safetensors")
    stored["model.layers.1.mlp.down_proj.bitmap"][3] ^= 0b101
    save_file(stored, newest / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"^no checkpoint .* is whole"):  # as long as the manifest tells
        (folder / "checkpoints/checkpoint-4/optimizer.pt").write_bytes(b"")
        go(smet(tmp_path))
    manifest = json.loads((newest / checkpoint.MANIFEST).read_text())
    digest = hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()
    manifest["files"]["model.safetensors"] = [(newest / "model.safetensors").stat().st_size, digest]
    (newest / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.newest_valid(folder / "checkpoints", print) == newest
    before = {name: data for name, data in contents(folder).items() if name.startswith(("checkpoints", "model"))}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.bitmap.*") as caught:
        go(smet(tmp_path))
    assert "\n" not in str(caught.value)
    assert before == {n: d for n, d in contents(folder).items() if n.startswith(("checkpoints", "model"))}


# -- another number of ranks ------------------------------------------------------------------------------------------

TOTAL = 9


def advance(model: Any, handle: Any, optimizer: Any, steps: range, rows: slice) -> None:
    for step in steps:
        ids = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(step))[rows]
        handle.before_step(step, TOTAL)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        handle.after_step(step, TOTAL)
        optimizer.zero_grad()


def part(rank: int, world: int, steps: range, source: str, target: str) -> None:
    """The given steps on `world` ranks, FSDP2 where there are several, from one full state to another."""
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.fsdp import fully_shard

    model: Any = tiny_model("llama").train()
    handle: Any = fallow.sparsify(model, fallow.SMET(density=0.25, update_every=2, warmup_steps=3))
    if world > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer: Any = handle.optimizer(lr=1e-2, eps=1e-4)
    full = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if source:
        state = torch.load(source)
        handle.load_state_dict(state["handle"])
        dcp.set_model_state_dict(model, state["model"], options=full)
        dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=full)
    advance(model, handle, optimizer, steps, slice(4 * rank // world, 4 * (rank + 1) // world))
    saved = {
        "model": dcp.get_model_state_dict(model, options=full),
        "optimizer": dcp.get_optimizer_state_dict(model, optimizer, options=full),
        "handle": handle.state_dict(),
    }
    if rank == 0:
        torch.save(saved, target)


def steps_on(world: int, steps: range, source: str, target: Path) -> dict[str, Any]:
    if world == 1:
        part(0, 1, steps, source, str(target))
    else:
        (target.parent / f"ranks-{target.stem}").mkdir()
        folder = target.parent / f"ranks-{target.stem}"
        run_ranks(part, world, steps, source, str(target), folder=folder, world=world)
    return torch.load(target)


def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """1 -> 2 and 2 -> 1: topology, ages and update steps are those of a run that never changed, weights close; with
    the number of ranks kept, bit-equal."""
    cut = 5  # two moves lie before it and two behind
    whole = {world: steps_on(world, range(TOTAL), "", tmp_path / f"whole{world}.pt") for world in (1, 2)}
    for world in (1, 2):
        steps_on(world, range(cut), "", tmp_path / f"first{world}.pt")
    for before, after in ((1, 1), (2, 2), (1, 2), (2, 1)):
        found = steps_on(
            after, range(cut, TOTAL), str(tmp_path / f"first{before}.pt"), tmp_path / f"{before}{after}.pt"
        )
        want = whole[after]
        assert found["handle"]["updates"] == want["handle"]["updates"] == 4
        assert torch.equal(found["handle"]["update_steps"], want["handle"]["update_steps"])
        assert found["model"].keys() == want["model"].keys()
        for name, expected in want["model"].items():
            if before == after or name.endswith(".bitmap"):
                assert torch.equal(found["model"][name], expected), (before, after, name)
            else:
                torch.testing.assert_close(found["model"][name], expected, rtol=1e-4, atol=1e-5)
        states = want["optimizer"]["state"]
        ages = {name: state["age"] for name, state in states.items() if "age" in state}
        assert len(ages) == 14 and {int(a) for age in ages.values() for a in age.unique()} == {0, 1, 2, 3, 255}
        for name, state in states.items():
            for key, expected in state.items():
                value = found["optimizer"]["state"][name][key]
                if before == after or key in ("age", "step"):
                    assert torch.equal(value, expected), (before, after, name, key)
                else:
                    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)


# -- what a comparison records ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compare_counts_dense_and_sparse_state_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    recipe = settings(tmp_path, steps=8, save_every=4, eval_every=4, log_every=4, precision=precision)
    recipe["arms"] = {"dense": {"method": "none"}, "smet": SMET, "sat": {"method": "sat", "omit": 0.5}}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert compare_command([str(path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"step 4/8 .* density 0\.25  ", printed) and re.search(r"step 4/8 .* omit 0\.\d\d  ", printed)
    assert len(re.findall(r"step 4/8  loss [\d.]+  [\d,]+ tokens/s  [\d.]+ GiB", printed)) == 1, "dense has neither"
    records = {arm: json.loads((tmp_path / f"runs/tiny/{arm}/run.json").read_text()) for arm in recipe["arms"]}
    dense, sparse, sat = (records[arm]["memory"] for arm in ("dense", "smet", "sat"))
    model = tiny_model("llama", vocab_size=320)
    inner = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and ".layers." in n)
    size = 4 if precision == "fp32" else 2
    assert dense["layers"] == {
        "weights": size * inner,
        "gradients": size * inner,
        "moments": 8 * inner,
        "masters": 0 if size == 4 else 4 * inner,
        "clocks": 0,
        "topology": 0,
    }
    assert dense["layers_total"] == sparse["layers_dense"] == 16 * inner
    assert dense["rest"] == sparse["rest"] and dense["total"] == dense["layers_total"] + dense["rest"]
    assert sparse["layers"] == sparse["predicted"] and sparse["step"] == 8
    assert sparse["layers"]["weights"] == size * inner // 4 and sparse["layers"]["clocks"] == inner // 4
    assert sparse["ratio"] == sparse["layers_total"] / dense["layers_total"] < 0.45
    assert {"step": 8} | sat["layers"] == {"step": 8} | dense["layers"], "omission keeps every weight"
    for arm in ("dense", "smet"):
        on_disk = tmp_path / f"runs/tiny/{arm}/checkpoints/checkpoint-4"
        files = records[arm]["memory"]["files"]
        assert files["checkpoint"] == sum(p.stat().st_size for p in on_disk.iterdir())
        assert files["checkpoint_optimizer"] == (on_disk / "optimizer.pt").stat().st_size
        assert files["model"] > 0 and files["checkpoint_weights"] < files["checkpoint"]
    assert sparse["files"]["checkpoint"] < dense["files"]["checkpoint"]
    moved = [e["smet/updates"] for e in lines(tmp_path / "runs/tiny/smet", "train")]
    assert moved == [0, 1, 2] and {e["density"] for e in lines(tmp_path / "runs/tiny/smet", "train")} == {0.25}
    assert lines(tmp_path / "runs/tiny/smet", "layers")[-1]["density"] == [0.25, 0.25]
    assert "omit_ffn" in lines(tmp_path / "runs/tiny/sat", "train")[0]
