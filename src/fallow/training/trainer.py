"""Hugging Face's Trainer (TRL's for `task: sft`) with fallow's order of data, clocks, checkpoints and dense evaluation.

Both trainers share one mixin, so that plain text and instructions are measured and resumed in the same way. What is
overridden and why: the sampler (one stream of rows as a pure function of the seed, so that arms of different length
see the same prefix and a resumed run continues it), the optimizer (the method's own), the loss (the model's, with
token counts over all micro-batches; TRL's fused head is built for GPUs), evaluation (see heldout.py) and saving (see
checkpoint.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fallow.method import Method, Mode
from fallow.optim import adamw_for
from fallow.training import checkpoint, heldout
from fallow.training.callback import SparsityCallback, save_state
from fallow.training.meters import Meters
from fallow.training.recipe import Recipe

METERS_FILE = "meters.json"
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class RowOrder(Sampler[int]):
    """`count` row numbers: all rows in a random order, then all in another, …; a pure function of (seed, rows)."""

    def __init__(self, *, rows: int, count: int, seed: int) -> None:
        self.rows, self.count, self.seed = rows, count, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        left, epoch = self.count, 0
        while left > 0:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()[:left]
            yield from order
            left, epoch = left - len(order), epoch + 1


def batched(numbers: Iterable[int], size: int) -> Iterator[list[int]]:
    """Lists of `size` numbers."""
    stream = iter(numbers)
    while found := list(islice(stream, size)):
        yield found


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack packed rows into a batch, each column int64 [B, T]. No attention mask: see packing.py."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Hooks:
    """What the trainer tells the run: each a function the run may replace."""

    def __init__(self) -> None:
        self.on_step: Callable[[int], None] = lambda step: None
        self.on_log: Callable[[dict[str, float]], None] = lambda logs: None
        self.on_eval: Callable[[float, float | None], None] = lambda loss, sparse_loss: None
        self.on_updated: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None
        self.stopped: Callable[[], bool] = lambda: False


class RunMixin(Trainer):
    """Overrides shared by both trainers; `attach` comes between construction and `train`."""

    recipe: Recipe
    meters: Meters
    hooks: Hooks
    sparsity: Method | None
    _target: str | None = None

    def attach(self, recipe: Recipe, meters: Meters, hooks: Hooks, sparsity: Method | None) -> None:
        """Give the trainer the run it belongs to."""
        self.recipe, self.meters, self.hooks, self.sparsity = recipe, meters, hooks, sparsity
        self.remove_callback(PrinterCallback)
        self.add_callback(_Pace(self))
        if sparsity is not None:
            rows: Any = self.eval_dataset
            sparsity.watch(collate([rows[i] for i in range(min(recipe.batch_size, len(rows)))]))
            self.add_callback(_TimedSparsity(sparsity, meters))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        r = self.recipe
        count = r.steps * r.accumulate * r.batch_size * self.args.world_size
        return RowOrder(rows=len(self.train_dataset), count=count, seed=r.seed)  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            settings = {"lr": self.recipe.lr, "weight_decay": self.recipe.weight_decay, "betas": self.recipe.betas}
            self.optimizer = (
                self.sparsity.optimizer(**settings) if self.sparsity else adamw_for(self.model, **settings)  # type: ignore[arg-type]
            )
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.meters.step_begins()
        with self.meters.phase("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.meters.phase("backward"):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with self.meters.phase("forward"):
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _clip_grad_norm(self, model: Any) -> Any:
        with self.meters.phase("optimizer"):
            return super()._clip_grad_norm(model)

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing reads it, and counting walks over every parameter at each step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs and "learning_rate" in logs and self.is_world_process_zero():
            self.hooks.on_log(logs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Dense held-out loss in nats per token as `eval_loss`; empty when Ctrl-C ended it. Also the loss computed
        sparse, of a method whose weights may be served so."""
        both = self._both_modes()
        with self.meters.phase("evaluation"):
            found = self._heldout("dense")
            sparse = self._heldout("sparse") if both and found is not None else None
        if found is None or (both and sparse is None):
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False
            return {}
        self.hooks.on_eval(found, sparse)
        metrics = {"eval_loss": found}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _both_modes(self) -> bool:
        """Whether held-out loss is taken computed sparse as well: at the end, or wherever the method can serve."""
        if self.sparsity is None or not self.sparsity.two_modes:
            return False
        return self.sparsity.sparse_from_start or self.state.global_step >= self.recipe.steps

    def prepare(self) -> Iterator[dict[str, Any]]:
        """What the method trains by itself before the first step, on the training rows in an order of their own."""
        if self.sparsity is None:
            return
        rows: Any = self.train_dataset
        order = RowOrder(rows=len(rows), count=1 << 40, seed=self.recipe.seed + 7919)
        with self.meters.phase("selection"):
            yield from self.sparsity.prepare(
                {k: v.to(self.args.device) for k, v in collate([rows[i] for i in numbers]).items()}
                for numbers in batched(order, self.recipe.batch_size)
            )

    def _heldout(self, mode: Mode) -> float | None:
        assert isinstance(self.model, PreTrainedModel)
        return heldout.loss(
            self.model,
            self.eval_dataset,  # type: ignore[arg-type]
            tokens=self.recipe.eval_tokens,
            batch_size=self.recipe.batch_size,
            sparsity=self.sparsity,
            mode=mode,
            stopped=self.hooks.stopped,
        )

    def _get_output_dir(self, trial: Any) -> str:
        return self._target or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        with self.meters.phase("checkpoint"):
            if self.args.should_save:
                checkpoint.clear(folder, step)
            self.accelerator.wait_for_everyone()
            self._target = str(checkpoint.staging(folder, step))
            try:
                checkpoint.guarded(folder, step, lambda: self._fill(model, trial, step))
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    filled = checkpoint.place(Path(self._target), step)
                    checkpoint.guarded(folder, step, lambda: checkpoint.commit(folder, step, filled) and None)
            finally:
                self._target = None
            self.accelerator.wait_for_everyone()

    def _fill(self, model: Any, trial: Any, step: int) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            target = checkpoint.place(Path(str(self._target)), step)
            (target / METERS_FILE).write_text(json.dumps(self.meters.state()))
            if self.sparsity is not None:
                save_state(self.sparsity, target)


class _Pace(TrainerCallback):
    """Clocks each optimizer step and decides after it whether to log, evaluate, save or stop."""

    def __init__(self, trainer: RunMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meters.enter("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meters.leave()
        # A step that will be logged: weights are updated, gradients still there.
        if _logged(self.trainer.recipe, state.global_step + 1, state.max_steps):
            self.trainer.hooks.on_updated(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, recipe, step = self.trainer, self.trainer.recipe, state.global_step
        sparsity = trainer.sparsity
        chosen = sparsity.metrics().get(f"{sparsity.name}/selection_seconds", 0.0) if sparsity else 0.0
        trainer.meters.step_ends(chosen)
        trainer.hooks.on_step(step)
        last = step >= state.max_steps

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        control.should_log = _logged(recipe, step, state.max_steps)
        control.should_evaluate = due(recipe.eval_every) or last
        control.should_save = due(recipe.save_every) and not last
        if trainer.hooks.stopped() and not last:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def _logged(recipe: Recipe, step: int, last: int) -> bool:
    return step % recipe.log_every == 0 or step == 1 or step >= last


class _TimedSparsity(SparsityCallback):
    """SparsityCallback whose calls into the method count as selection."""

    def __init__(self, sparsity: Method, meters: Meters) -> None:
        super().__init__(sparsity)
        self.meters = meters

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        with self.meters.phase("selection"):
            super().on_step_begin(*args, **kwargs)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with self.meters.phase("selection"):
            super().on_optimizer_step(*args, **kwargs)


class TextTrainer(RunMixin):
    """Continues plain text (`task: clm`)."""


def build(
    recipe: Recipe, *, model: PreTrainedModel, tokenizer: Any, data: Any, folder: Path, device: torch.device
) -> RunMixin:
    """The trainer of a recipe's task, writing checkpoints into `folder`; `attach` it before use."""
    settings = _arguments(recipe, folder, device)
    inputs = {
        "model": model,
        "train_dataset": data.train,
        "eval_dataset": data.evaluation,
        "data_collator": collate,
        "processing_class": tokenizer,
    }
    if recipe.task == "clm":
        return TextTrainer(args=TrainingArguments(**settings), **inputs)
    from fallow.training.instructions import InstructionTrainer, instruction_arguments

    own_forward = model.__dict__.get("forward")
    trainer = InstructionTrainer(args=instruction_arguments(settings), **inputs)
    # TRL wraps the instance's forward with a fused head, which RunMixin.compute_loss never uses: back to stock.
    with contextlib.suppress(AttributeError):
        del model.forward
    if own_forward is not None:
        model.forward = own_forward  # type: ignore[method-assign]
    return trainer


def _arguments(recipe: Recipe, folder: Path, device: torch.device) -> dict[str, Any]:
    """TrainingArguments as keywords: everything that decides the mathematics, and every convenience of theirs off."""
    names = TrainingArguments.__dataclass_fields__
    recompute = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulate,
        "max_steps": recipe.steps,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": _SCHEDULES[recipe.schedule],
        "warmup_steps": recipe.warmup,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip,
        "seed": recipe.seed,
        "bf16": False,  # pure-bf16 weights, never autocast: see precision.py
        "use_cpu": device.type == "cpu",
        recompute: recipe.gradient_checkpointing,
        f"{recompute}_kwargs": {"use_reentrant": False} if recipe.gradient_checkpointing else None,
        "logging_strategy": "no",  # _Pace decides when to log, evaluate and save
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
    }
