"""`fallow export RUN --to TARGET`: a finished run's model, or any model folder, written, verified and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fallow.cli import VerbParser
from fallow.errors import ConfigError
from fallow.exporting import TARGETS, Exported, export

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fallow.method import Method


def export_command(argv: list[str]) -> int:
    """Write the export and print its sizes. Raises ConfigError where RUN holds no finished run and no model."""
    args = _parser().parse_args(argv)
    base, source = find_model(args.run)
    output = args.output or base / f"export-{args.to}"
    if source.resolve().is_relative_to(output.expanduser().resolve()):
        raise ConfigError(f"export: {output} holds the model that is to be exported; choose another --output")
    from fallow.exporting.stock import load_folder
    from fallow.training.callback import SCALARS
    from fallow.training.quiet import quiet

    quiet()
    model, tokenizer = load_folder(source)
    if args.to not in ("hf", "packed") and (source / SCALARS).is_file():
        restore_method(model, source).set_mode("dense" if args.dense else "sparse")
    done = export(model, output, to=args.to, tokenizer=tokenizer, overwrite=args.overwrite)
    if args.json:
        print(json.dumps({"source": str(source), **done.as_dict()}))
    else:
        print("\n".join(lines(done)))
    return 0


def find_model(run: Path) -> tuple[Path, Path]:
    """(the folder an export goes into, the folder with the model) of what was typed as RUN.

    Raises:
        ConfigError: no such folder; no finished run and no model in it; or several arms.
    """
    from fallow.training.runfolder import RunFolder

    run = run.expanduser()
    if not run.is_dir():
        raise ConfigError(f"export: {run} is no folder; give a run's folder, e.g. runs/NAME/ARM, or a model's")
    if (run / "config.json").is_file():
        return run, run
    if not (run / "run.json").is_file():
        arms = sorted(file.parent for file in run.glob("*/run.json"))
        if not arms:
            raise ConfigError(f"export: {run} holds neither a run (run.json) nor a model (config.json)")
        if len(arms) > 1:
            raise ConfigError(f"export: {run} holds several arms; choose one: {', '.join(map(str, arms))}")
        run = arms[0]
    folder = RunFolder(run)
    status = (folder.read() or {}).get("status", "unreadable")
    if status != "finished":
        raise ConfigError(f"export: the run in {run} is {status}, not finished; run its command again to finish it")
    if not (folder.model / "config.json").is_file():
        raise ConfigError(f"export: the run in {run} is finished but {folder.model} holds no model; train it again")
    return run, folder.model


def restore_method(model: PreTrainedModel, source: Path) -> Method:
    """The method of the run whose trained model lies in `source`, as it was after the last step.

    Raises:
        ConfigError: the run's settings are not to be found, or are of no method.
        CheckpointError: the method's state is damaged, or of another model.
    """
    from fallow.handle import sparsify
    from fallow.training.callback import SCALARS, load_state
    from fallow.training.recipe import method_class
    from fallow.training.runfolder import RunFolder

    try:
        recipe = (RunFolder(source.parent).read() or {})["recipe"]
        config = method_class(recipe["method"])(**recipe["method_settings"])
    except (KeyError, TypeError):
        raise ConfigError(
            f"export: {source.parent / 'run.json'} does not tell the method's settings that belong to"
            f" {source / SCALARS}; keep the model in its run's folder"
        ) from None
    handle = sparsify(model, config)
    load_state(handle, source)
    return handle


def lines(done: Exported) -> list[str]:
    """What is printed of an export."""
    packed = f", {done.packed_layers} layers packed" if done.packed_layers else ""
    return [
        f"{done.path} ({done.to}: {TARGETS[done.to]})",
        f"dense     {done.dense_bytes:,} bytes of weights",
        f"written   {done.weight_bytes:,} bytes of weights ({done.ratio:.3f} of dense{packed}),"
        f" {sum(done.files.values()):,} bytes in {len(done.files)} files",
        *(f"verified  {line}" for line in done.verified),
    ]


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="fallow export",
        description=(__doc__ or "").split("\n")[0],
        epilog="targets: " + "; ".join(f"{name}: {what}" for name, what in TARGETS.items()),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder, or one with a model")
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="what to write")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/export-TARGET")
    parser.add_argument("--dense", action="store_true", help="gguf: all neurons, although the run has experts")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
