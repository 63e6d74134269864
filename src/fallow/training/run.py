"""One run end to end: load, make sparse, train, measure, and leave run.json, metrics.jsonl and the trained model.

Running the same recipe again continues an unfinished run from its newest whole checkpoint, and leaves a finished one
alone. Everything that decides the result is in the recipe; what it resolved to is written down before the first step.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

import fallow
from fallow import machine, ops
from fallow.errors import CheckpointError
from fallow.handle import sparsify
from fallow.method import Method
from fallow.ops import attention, cross_entropy
from fallow.training import checkpoint, data, models, precision, scratch, state_bytes, trainer
from fallow.training.cache import build_folder
from fallow.training.callback import save_state
from fallow.training.meters import Meters, memory_mb
from fallow.training.progress import Display
from fallow.training.recipe import Recipe
from fallow.training.runfolder import (
    RunFolder,
    arm_name,
    file_names,
    folder_of,
    forget,
    now,
    plain,
    result_line,
    same_settings,
)
from fallow.training.stopping import Stopper


def run(
    recipe: Recipe, *, arm: str | None = None, command: str = "", display: Display, overwrite: bool = False
) -> dict[str, Any]:
    """Train as the recipe says, or resume, or report that it is done.

    Args:
        recipe: one arm's resolved recipe.
        arm: name of the run's folder; from the method unless given.
        command: the command line that was typed, for run.json.
        display: where to print.
        overwrite: start anew although the folder holds a run.

    Returns:
        run.json as written; its `status` is "finished", or "interrupted" after Ctrl-C.

    Raises:
        ConfigError: a setting is wrong, or the folder holds a run with other settings.
        DataError: the data cannot be used.
        CheckpointError: nothing can be written, or no checkpoint is whole.
    """
    arm = arm or arm_name(recipe)
    folder = folder_of(recipe, arm)
    earlier = None if overwrite else folder.read()
    if earlier is not None:
        same_settings(recipe, earlier, folder)
        if earlier.get("status") == "finished":
            display.say(f"{folder.path}: finished already ({result_line(earlier)}); --overwrite runs it anew")
            return earlier
    folder.make()
    if earlier is None:
        forget(folder)
    return _Run(recipe, arm, command, display, folder, earlier).go()


class _Run:
    """The state of one run while it goes."""

    def __init__(
        self,
        recipe: Recipe,
        arm: str,
        command: str,
        display: Display,
        folder: RunFolder,
        earlier: dict[str, Any] | None,
    ) -> None:
        self.recipe, self.display, self.folder = recipe, display, folder
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.resumed = checkpoint.newest_valid(folder.checkpoints, display.say) if earlier else None
        self.meters = Meters(tokens_per_step=recipe.tokens_per_step(), device=self.device)
        self.chosen = precision.choose(self.device, recipe.precision)
        if self.resumed and recipe.precision == "auto":  # the machine, or its mood, may be another one now
            self.chosen = precision.of_earlier((earlier or {}).get("precision") or {}) or self.chosen
        set_seed(recipe.seed)
        self.start = scratch.start(recipe, self.chosen.dtype)
        self.model, self.tokenizer = self.start.model, self.start.tokenizer
        model_facts = models.describe(self.model, self.start.name)
        self.data = data.prepare(recipe, self.tokenizer, model_facts["vocab"])
        backend_lines = self._fast_paths()
        config = recipe.method_config()
        self.sparsity: Method | None = sparsify(self.model, config) if config is not None else None
        self.started_at = self.resumed and checkpoint.step_of(self.resumed)
        self.record: dict[str, Any] = {
            "fallow": fallow.__version__,
            "run": recipe.name,
            "arm": arm,
            "status": "running",
            "started": (earlier or {}).get("started") or now(),
            "finished": None,
            "command": command,
            "recipe": plain(recipe),
            "method": recipe.method_summary(),
            "judged_sparse": bool(self.sparsity and self.sparsity.sparse_from_start),
            "model": model_facts,
            "data": {k: self.data.summary[k] for k in ("train_tokens", "eval_tokens", "files", "digest")},
            "machine": machine.describe(),
            "versions": machine.versions() | {"fallow": fallow.__version__},
            "precision": {"dtype": precision.name_of(self.chosen.dtype), "reason": self.chosen.reason},
            "backends": {},
            "totals": self.meters.totals(),
            "eval": {"before": {"loss": None}, "after": {"loss": None}},
            "time": self.meters.time_by_phase(),
            "memory": {},
        }
        if earlier and self.resumed:
            self.record["eval"] = earlier.get("eval") or self.record["eval"]
        self._print_header(backend_lines, earlier is not None)
        self._check_packing()
        if self.sparsity is not None and self.resumed is None:
            for line in self.sparsity.advice(recipe.tokens_per_step() // recipe.accumulate // recipe.nproc):
                self.display.say(f"warning    {line}")

    def _fast_paths(self) -> list[str]:
        """Put the fastest sound attention and loss on this instance; the same for every arm."""
        if self.recipe.compile:
            self.model.compile()
        if self.device.type != "cpu":
            return ["attention and loss: stock"]
        self.model.loss_function = cross_entropy.causal_lm_loss  # type: ignore[assignment]
        return [attention.enable(self.model)]

    def _check_packing(self) -> None:
        if not models.documents_stay_apart(self.model):
            self.display.say(
                f"packing    {self.model.config.model_type} ignores document boundaries: texts packed into one row see"
                " each other"
            )

    def _print_header(self, backend_lines: list[str], again: bool) -> None:
        say, r, m, d = self.display.say, self.record, self.record["model"], self.record["data"]
        say(f"run        {self.folder.path}")
        say(f"model      {m['name']}: {m['family']}, {m['parameters'] / 1e6:,.1f}M parameters, {m['layers']} layers")
        if self.start.tokenizer_origin:
            say(f"tokenizer  {self.start.tokenizer_origin}")
        sizes = f"{d['train_tokens']:,} tokens to train on, {d['eval_tokens']:,} held out"
        say(f"data       {sizes} ({file_names(d['files'])})")
        say(f"precision  {r['precision']['dtype']}: {r['precision']['reason']}")
        for line in backend_lines:
            say(f"backends   {line}")
        method = r["method"]
        text = "none (dense)" if method is None else ", ".join(f"{k}={v}" for k, v in method.items() if k != "name")
        say(f"method     {text if method is None else method['name'] + ': ' + text}")
        if self.resumed is not None:
            say(f"resuming   from {self.resumed.name} of {self.recipe.steps} steps")
        elif again:
            say("resuming   no checkpoint was saved before the run ended; starting at step 0")

    def go(self) -> dict[str, Any]:
        try:
            return self._train()
        except BaseException as error:
            self.record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(CheckpointError):  # the disk refuses, as the error being raised may say already
                self._write()
            raise
        finally:
            self.display.stop()

    def _train(self) -> dict[str, Any]:
        loop = trainer.build(
            self.recipe,
            model=self.model,
            tokenizer=self.tokenizer,
            data=self.data,
            folder=self.folder.checkpoints,
            device=self.device,
        )
        self.main = loop.is_world_process_zero()
        hooks = trainer.Hooks()
        hooks.on_step, hooks.on_log, hooks.on_eval = self.display.step, self._on_log, self._on_eval
        hooks.on_updated = self._on_updated
        loop.attach(self.recipe, self.meters, hooks, self.sparsity)
        if self.resumed is not None:
            self.meters.restore(json.loads((self.resumed / trainer.METERS_FILE).read_text()))
        if self.main:
            self.folder.forget_after(self.meters.steps if self.resumed else -1)
            self._write()
        with Stopper(self.display.say) as stopper:
            hooks.stopped = lambda: stopper.requested
            if self.resumed is None:
                self._prepare(loop)
                loop.evaluate()
            if stopper.requested:
                raise KeyboardInterrupt
            self.display.start(self.recipe.steps, self.meters.steps)
            loop.train(resume_from_checkpoint=str(self.resumed) if self.resumed else None)
        self.display.stop()
        self.record["backends"] = self._backends()
        if self.meters.steps < self.recipe.steps:
            return self._interrupted()
        if self.main:
            self._save_model()
        self.record |= {"status": "finished", "finished": now()}
        self._count_files()
        if self.main:
            self._write()
        self.display.say(f"done       {result_line(self.record)}")
        self.display.say(f"           {self.folder.path} (the trained model: {self.folder.model})")
        return self.record

    def _prepare(self, loop: trainer.RunMixin) -> None:
        """The method's own first stage, its progress printed and kept."""
        for record in loop.prepare():
            self.folder.append({"kind": "prepare", **record})
            means = ((k, sum(v) / len(v) if isinstance(v, list) else v) for k, v in record.items())
            self.display.say("first stage  " + ", ".join(f"{k} {v:,.4g}" for k, v in means))

    def _interrupted(self) -> dict[str, Any]:
        self.record |= {"status": "interrupted", "finished": now()}
        self._count_files()
        if self.main:
            self._write()
        saved = checkpoint.place(self.folder.checkpoints, self.meters.steps)
        self.display.say(
            f"interrupted after step {self.meters.steps} of {self.recipe.steps}; saved {saved};"
            " run the same command again to resume"
        )
        return self.record

    def _save_model(self) -> None:
        """The stock model, as weights were trained, loadable by `from_pretrained`; renamed into place when whole."""
        kept = self.sparsity if self.sparsity and self.sparsity.two_modes else None
        model = self.sparsity.remove() if self.sparsity else self.model
        assert isinstance(model, PreTrainedModel)
        shutil.rmtree(self.folder.model, ignore_errors=True)

        def build(target: Path) -> None:
            model.save_pretrained(target)
            self.tokenizer.save_pretrained(target)
            if kept is not None:
                save_state(kept, target)

        with self.meters.phase("checkpoint"):
            checkpoint.guarded(
                self.folder.checkpoints, self.meters.steps, lambda: build_folder(self.folder.model, build) and None
            )

    def _on_log(self, logs: dict[str, float]) -> None:
        layers = self.sparsity.layer_metrics() if self.sparsity else {}
        means = {name: sum(v) / len(v) for name, v in layers.items() if v}
        rate, memory = self.meters.tokens_per_second(self.recipe.log_every), memory_mb(self.device)
        self.folder.append(
            {
                "kind": "train",
                **self._now_at(),
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens_per_second": round(rate, 2),
                "memory_mb": round(memory, 1),
                **means,
                **(self.sparsity.metrics() if self.sparsity else {}),
            }
        )
        if layers:
            self.folder.append({"kind": "layers", "step": self.meters.steps, **layers})
        self.display.logged(
            self.meters.steps, loss=logs["loss"], tokens_per_second=rate, measures=means, memory_mb=memory
        )

    def _on_updated(self, optimizer: torch.optim.Optimizer) -> None:
        """Inside a step that will be logged, gradients not yet freed. The last one's count stays in run.json."""
        counted = state_bytes.count(self.model, optimizer, self.sparsity)
        self.record["memory"] = {"step": self.meters.steps + 1} | counted

    def _count_files(self) -> None:
        self.record["memory"] |= {"files": state_bytes.files(self.folder.checkpoints, self.folder.model)}

    def _on_eval(self, loss: float, sparse_loss: float | None) -> None:
        if not self.main:
            return
        both = {"loss": loss} | ({"sparse_loss": sparse_loss} if sparse_loss is not None else {})
        self.folder.append({"kind": "eval", **self._now_at(), **both})
        when = "before" if self.meters.steps == 0 else "after"
        self.record["eval"][when] = both
        sparse = f", computed sparse {sparse_loss:.4f}" if sparse_loss is not None else ""
        self.display.say(f"held-out loss at step {self.meters.steps}: {loss:.4f}{sparse}")
        self._write()

    def _now_at(self) -> dict[str, Any]:
        m = self.meters
        return {"step": m.steps, "tokens": m.tokens, "seconds": round(m.train_seconds, 3)}

    def _backends(self) -> dict[str, str]:
        """What ran. Operations of a sparse arm earlier in this process are not this run's when it is dense."""
        return {op: name for op, name in ops.used().items() if self.sparsity or op not in ops.OF_SPARSE_METHODS}

    def _write(self) -> None:
        self.record["totals"], self.record["time"] = self.meters.totals(), self.meters.time_by_phase()
        if self.sparsity and (insight := self.sparsity.insight()):
            self.record["insight"] = insight
        self.folder.write(self.record)


def release() -> None:
    """Free what a finished arm held, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
