"""A finished run's model and method, from what a user typed as RUN: an arm's folder, its run's, or any model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fallow.errors import ConfigError
from fallow.training.runfolder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fallow.method import Method


def find_model(run: Path, *, verb: str) -> tuple[Path, Path]:
    """(the folder that what is made of it goes into, the folder with the model) of what was typed as RUN.

    Args:
        run: what was typed.
        verb: begins the messages.

    Raises:
        ConfigError: no such folder; no finished run and no model in it; or several arms.
    """
    run = run.expanduser()
    if not run.is_dir():
        raise ConfigError(f"{verb}: {run} is no folder; give a run's folder, e.g. runs/NAME/ARM, or a model's")
    if (run / "config.json").is_file():
        return run, run
    if not (run / "run.json").is_file():
        arms = sorted(file.parent for file in run.glob("*/run.json"))
        if not arms:
            raise ConfigError(f"{verb}: {run} holds neither a run (run.json) nor a model (config.json)")
        if len(arms) > 1:
            raise ConfigError(f"{verb}: {run} holds several arms; choose one: {', '.join(map(str, arms))}")
        run = arms[0]
    folder = RunFolder(run)
    status = (folder.read() or {}).get("status", "unreadable")
    if status != "finished":
        raise ConfigError(f"{verb}: the run in {run} is {status}, not finished; run its command again to finish it")
    if not (folder.model / "config.json").is_file():
        raise ConfigError(f"{verb}: the run in {run} is finished but {folder.model} holds no model; train it again")
    return run, folder.model


def has_method(source: Path) -> bool:
    """Whether a method's state lies beside the model in `source`."""
    from fallow.training.callback import SCALARS

    return (source / SCALARS).is_file()


def restore_method(model: PreTrainedModel, source: Path, *, verb: str) -> Method:
    """The method of the run whose trained model lies in `source`, as it was after the last step.

    Raises:
        ConfigError: the run's settings are not to be found, or are of no method.
        CheckpointError: the method's state is damaged, or of another model.
    """
    from fallow.handle import sparsify
    from fallow.training.callback import SCALARS, load_state
    from fallow.training.recipe import method_class

    try:
        recipe = (RunFolder(source.parent).read() or {})["recipe"]
        config = method_class(recipe["method"])(**recipe["method_settings"])
    except (KeyError, TypeError):
        raise ConfigError(
            f"{verb}: {source.parent / 'run.json'} does not tell the method's settings that belong to"
            f" {source / SCALARS}; keep the model in its run's folder"
        ) from None
    handle = sparsify(model, config)
    load_state(handle, source)
    return handle
