"""The bridge from a fallow method to any `transformers.Trainer` or `trl.SFTTrainer`.

A callback rather than a Trainer subclass, because people bring their own Trainer. It calls the method once per
*optimizer* step (not per micro-batch), logs its metrics, and keeps its state beside each checkpoint: tensors in
`sparsity.safetensors`, scalars in `sparsity.json`. The optimizer is given to the Trainer as usual:
`optimizers=(sparsity.optimizer(lr=…), None)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fallow.errors import CheckpointError
from fallow.method import Method
from fallow.training.cache import write_atomically

TENSORS, SCALARS = "sparsity.safetensors", "sparsity.json"


def save_state(sparsity: Method, folder: Path) -> None:
    """Write the method's state into a checkpoint folder."""
    state = sparsity.state_dict()
    tensors = {k: v.detach().contiguous().clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    scalars = {k: v for k, v in state.items() if k not in tensors}
    temporary = folder / (TENSORS + ".partial")
    save_file(tensors, temporary)
    temporary.replace(folder / TENSORS)
    write_atomically(folder / SCALARS, json.dumps(scalars).encode())


def load_state(sparsity: Method, folder: Path) -> None:
    """Restore what `save_state` wrote. Raises CheckpointError when it is missing, damaged, or of another method."""
    try:
        state: dict[str, Any] = dict(load_file(folder / TENSORS))
        state |= json.loads((folder / SCALARS).read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no readable sparsity state ({type(error).__name__}); resume from a checkpoint that was"
            " written with SparsityCallback"
        ) from None
    sparsity.load_state_dict(state)


class SparsityCallback(TrainerCallback):
    """Drives a method from a Hugging Face Trainer.

    Args:
        sparsity: the handle `fallow.sparsify` returned.
        resume_from: the checkpoint folder given to `trainer.train(resume_from_checkpoint=…)`; found by itself when it
            lies in the Trainer's `output_dir`, as the Trainer's own checkpoints do.
    """

    def __init__(self, sparsity: Method, *, resume_from: str | Path | None = None) -> None:
        self.sparsity = sparsity
        self.resume_from = Path(resume_from) if resume_from is not None else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the method's state when the Trainer resumes. Raises CheckpointError where there is none."""
        if state.global_step > 0:
            load_state(
                self.sparsity, self.resume_from or Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called before the first micro-batch of an optimizer step."""
        self.sparsity.before_step(state.global_step, state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after `optimizer.step()`, before gradients are cleared."""
        self.sparsity.after_step(state.global_step, state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the method's metrics to the Trainer's history, and to what callbacks after this one see."""
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs:
            metrics = self.sparsity.metrics()
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the method's state beside the checkpoint the Trainer has just written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and not (folder / SCALARS).exists():
            save_state(self.sparsity, folder)
