"""Whole runs: what they write, what they print, how arms compare, and both trainers with the callback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fallow import SAT, SparsityCallback, sparsify
from fallow.cli.compare import compare_command
from fallow.cli.train import train_command
from fallow.errors import CheckpointError, ConfigError
from fallow.training import data, heldout
from fallow.training.progress import Display
from fallow.training.run import run
from fallow.training.settings import resolve
from fallow.training.trainer import RowOrder, collate
from tests.tiny_models import tiny_model
from tests.training.tiny_runs import settings, tokenizer


def go(root: Path, **changes: Any) -> dict[str, Any]:
    return run(resolve(settings(root, **changes), {}), display=Display(silent=True))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").open()) if e["kind"] == kind]


def test_a_run_learns_and_writes_what_the_report_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, steps=40, lr=1e-2, eval_every=20, log_every=5)))
    assert train_command([str(path), "--json"]) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    folder = tmp_path / "runs/tiny/dense"
    assert record == json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["arm"] == "dense" and record["method"] is None
    assert record["eval"]["after"]["loss"] < record["eval"]["before"]["loss"] - 1.0
    assert record["model"] | {"name": ""} == {
        "name": "",
        "family": "llama",
        "parameters": sum(p.numel() for p in tiny_model("llama", vocab_size=320).parameters()),
        "layers": 2,
        "d_model": 32,
        "ffn": 64,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 320,
    }
    totals, phases = record["totals"], record["time"]
    assert totals["steps"] == 40 and totals["tokens"] == 40 * 2 * 64
    in_step = sum(phases[k] for k in ("forward", "backward", "optimizer", "selection", "data", "other"))
    assert in_step == pytest.approx(totals["train_seconds"], rel=0.02, abs=0.01)
    assert phases["evaluation"] > 0 and totals["wall_seconds"] > totals["train_seconds"] > 0
    train, evals = lines(folder, "train"), lines(folder, "eval")
    assert [e["step"] for e in train] == [1, *range(5, 41, 5)]
    assert [e["step"] for e in evals] == [0, 20, 40] and evals[-1]["loss"] == record["eval"]["after"]["loss"]
    assert {"tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second", "memory_mb"} <= train[0].keys()
    assert train[-1]["tokens"] == totals["tokens"] and not lines(folder, "layers")
    for word in ("model ", "data ", "precision ", "backends ", "method ", "held-out loss", "done "):
        assert word in shown.err
    assert train_command([str(path)]) == 0
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"other settings \(lr: 0.01 there, 0.1 now\).*--overwrite"):
        train_command([str(path), "--lr", "0.1"])
    assert train_command([str(path), "--lr", "0.1", "--overwrite", "--steps", "2", "--eval-every", "0"]) == 0
    assert [e["step"] for e in lines(folder, "train")] == [1, 2]


def test_the_trained_model_is_stock_and_scores_as_measured(tmp_path: Path) -> None:
    record = go(tmp_path, method="sat", omit=0.5, ladder=0, steps=6)
    folder = tmp_path / "runs/tiny/sat"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    held = data.prepare(resolve(settings(tmp_path), {}), tokenizer(chat=True), 320).evaluation
    loss = heldout.loss(model, held, tokens=512, batch_size=3)
    assert loss == pytest.approx(record["eval"]["after"]["loss"], rel=1e-4)
    assert {e["omit_ffn"] for e in lines(folder, "train")} == {0.5}
    assert lines(folder, "layers")[0]["omit_ffn"] == [0.5, 0.5]
    assert record["method"]["omit"] == 0.5 and record["time"]["selection"] > 0


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    losses = []
    for name, batch, accumulate in (("one", 4, 1), ("four", 1, 4)):
        go(tmp_path, name=name, batch_size=batch, accumulate=accumulate, steps=5)
        losses.append([e["loss"] for e in lines(tmp_path / "runs" / name / "dense", "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_held_out_loss_is_weighted_by_tokens(tmp_path: Path) -> None:
    """One row with few answer tokens must not count as much as one with many."""
    model = tiny_model("llama", vocab_size=320)
    held = data.prepare(resolve(settings(tmp_path), {}), tokenizer(chat=True), 320).evaluation
    found = heldout.loss(model, held, tokens=10**6, batch_size=4)
    rows = collate([held[i] for i in range(len(held))])
    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], position_ids=rows["position_ids"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows["labels"][:, 1:].flatten())
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert model.training


def test_order_of_rows_is_a_prefix_for_shorter_runs() -> None:
    long, short = (list(RowOrder(rows=7, count=n, seed=3)) for n in (20, 9))
    assert long[:9] == short and sorted(long[:7]) == list(range(7)) and long[:7] != long[7:14]
    assert list(RowOrder(rows=7, count=7, seed=4)) != long[:7]


def test_compare_runs_arms_resumes_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = settings(tmp_path, steps=12, eval_every=4) | {
        "arms": {
            "dense": None,
            "sat": {"method": "sat", "omit": 0.5, "ladder": 0},
            "short": {"equal_seconds_to": "sat"},
        }
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert compare_command([str(path)]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "runs/tiny/compare.json").read_text())
    assert result["arms"] == ["dense", "sat", "short"] and result["baseline"] == "dense"
    dense, sat, short = (json.loads((tmp_path / f"runs/tiny/{arm}/run.json").read_text()) for arm in result["arms"])
    assert dense["eval"]["before"] == sat["eval"]["before"] == short["eval"]["before"]
    per_step = dense["totals"]["train_seconds"] / 12
    assert short["recipe"]["steps"] == max(1, round(sat["totals"]["train_seconds"] / per_step))
    assert (tmp_path / "runs/tiny/report.html").stat().st_size > 1000 and "report:" in out
    assert compare_command([str(path), "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("finished already") == 3
    assert json.loads(shown.out)["rows"] == result["rows"]


def test_instructions_train_on_answers_only(tmp_path: Path) -> None:
    """Prompts are noise and answers constant: the answers' loss falls to almost nothing."""
    settings(tmp_path)
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps({"q": f"{i * 7919 % 9973}?", "a": "yes indeed"}) + "\n" for i in range(200)))
    changes = {"train_data": [str(path)], "task": "sft", "prompt_field": "q", "answer_field": "a"}
    record = go(
        tmp_path, **changes, name="sft", steps=60, lr=1e-2, method="sat", omit=0.5, dense_tokens="loss", ladder=0
    )
    assert record["eval"]["before"]["loss"] > 4.0
    assert record["eval"]["after"]["loss"] < 0.5
    assert not list((tmp_path / "runs").rglob("README.md"))


@pytest.mark.parametrize("where", ["a file stands there", "/proc/fallow"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path, where: str) -> None:
    if where.startswith("a "):
        (tmp_path / "file").write_text("")
        where = str(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"output folder .* cannot be written .*; choose another with --output"):
        go(tmp_path, output=where)


def test_the_callback_serves_a_plain_trainer_and_its_resume(tmp_path: Path) -> None:
    """Four steps at once equal two, a new process' worth of objects, and two more."""
    settings(tmp_path)
    rows = data.prepare(resolve(settings(tmp_path), {}), tokenizer(chat=True), 320).train

    def trainer(folder: str, steps: int) -> tuple[Trainer, Any]:
        model = tiny_model("llama", vocab_size=320)
        sparsity = sparsify(model, SAT(omit=0.5, ladder=0, importance="uniform", refresh_every=3))
        args = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            lr_scheduler_type="constant",
        )
        optimizer = sparsity.optimizer(lr=1e-2)
        made = Trainer(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[SparsityCallback(sparsity)],
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        )
        return made, sparsity

    whole, _ = trainer("whole", 4)
    whole.train()
    assert whole.state.log_history[0]["sat/omit_ffn"] == 0.5
    saved = tmp_path / "whole/checkpoint-2"
    assert (saved / "sparsity.safetensors").exists() and json.loads((saved / "sparsity.json").read_text())
    again, _ = trainer("whole", 4)
    again.train(resume_from_checkpoint=str(saved))
    for (name, expected), found in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(expected, found), name
    (saved / "sparsity.json").unlink()
    broken, _ = trainer("whole", 4)
    with pytest.raises(CheckpointError, match="no readable sparsity state"):
        broken.train(resume_from_checkpoint=str(saved))
