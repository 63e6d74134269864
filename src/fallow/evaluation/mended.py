"""Writes a repaired model as a finished run's folder, with the record of what was changed beside it.

Everything that reads a run (evaluate, diagnose, export) reads it: run.json names the method and its settings as they
were, model/ has the weights and the method's state, repair.json says which layer was changed, how, and what it cost.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from fallow.anatomy.int8 import Int8Linear
from fallow.errors import CheckpointError, ConfigError
from fallow.evaluation.subject import Subject
from fallow.training.cache import build_folder
from fallow.training.callback import save_state
from fallow.training.runfolder import RunFolder, now

RECORD = "repair.json"


def check_output(folder: Path, subject: Subject) -> None:
    """Raises ConfigError: the folder holds something or the model itself, or the model has int8 weights."""
    if any(isinstance(module, Int8Linear) for module in subject.model.modules()):
        raise ConfigError(f"repair: {subject.name} has int8 weights; repair the run it was made from, and export that")
    if subject.source is not None and subject.source.resolve().is_relative_to(folder.expanduser().resolve()):
        raise ConfigError(f"repair: {folder} holds the model that is to be repaired; choose another --output")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"repair: {folder} is not empty; choose a new folder with --output")


def write(subject: Subject, folder: Path, record: dict[str, Any]) -> Path:
    """The repaired model in `folder`.

    Raises:
        CheckpointError: the folder cannot be written; what was half written is removed.
    """
    assert subject.sparsity is not None
    sparsity, model = subject.sparsity, subject.model
    run = RunFolder(folder.expanduser())
    earlier = None if subject.source is None else RunFolder(subject.source.parent).read()
    settings = {
        f.name: list(v) if isinstance(v := getattr(sparsity.config, f.name), tuple) else v
        for f in dataclasses.fields(sparsity.config)
    }
    recipe = ((earlier or {}).get("recipe") or {"model": subject.name}) | {
        "method": sparsity.name,
        "method_settings": settings,
    }

    def build(target: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        model.save_pretrained(target, state_dict=tensors)
        subject.tokenizer.save_pretrained(target)
        save_state(sparsity, target)

    run.make()
    try:
        build_folder(run.model, build)
        (run.path / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        shutil.rmtree(run.path, ignore_errors=True)
        raise CheckpointError(f"{folder} could not be written ({error.strerror}); choose another --output") from None
    run.checkpoints.rmdir()
    run.write(
        {
            "status": "finished",
            "run": f"{(earlier or {}).get('run') or 'model'}-repaired",
            "arm": (earlier or {}).get("arm") or sparsity.name,
            "finished": now(),
            "recipe": recipe,
            "method": {"name": sparsity.name, **settings},
            "model": subject.about,
            "repair": {k: record[k] for k in ("layer", "accepted", "recovered", "changed", "density", "summary")},
            "repaired_from": None if subject.source is None else str(subject.source),
        }
    )
    return run.path
