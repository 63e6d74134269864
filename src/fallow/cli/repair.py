"""`fallow repair MODEL`: mends the one layer that breaks long context, and keeps it only if nothing else suffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fallow.cli import VerbParser
from fallow.cli.evaluate import add_subject, load_subject, say, words
from fallow.errors import ConfigError


def repair_command(argv: list[str]) -> int:
    """Repair, write the model and its record, and print. Returns 1 where no repair was accepted: nothing is written.

    Raises:
        ConfigError: no layer given, nothing to repair in it, or the output folder is taken.
    """
    args = _parser().parse_args(argv)
    from fallow.evaluation import mended
    from fallow.evaluation.repairing import Asked, repair
    from fallow.evaluation.repairs import NAMES

    diagnosis = _diagnosis(args.diagnosis) if args.diagnosis else {}
    place = _layer(args, diagnosis)
    found = diagnosis.get("asked") or {}
    given: dict[str, Any] = {}
    if tasks := words(args.tasks) or found.get("tasks"):
        given["tasks"] = tuple(tasks)
    if lengths := args.lengths or found.get("lengths"):
        given["lengths"] = tuple(lengths)
    subject = load_subject(args, verb="repair")
    trained = _trained_on(subject.source)
    asked = Asked(
        data=args.data or trained["train_data"],
        held_data=args.held_data or trained["eval_data"],
        held_lengths=tuple(args.held_lengths or ()),
        documents=args.documents,
        seed=found.get("seed", 0) if args.seed is None else args.seed,
        target=args.target,
        repairs=tuple(words(args.repairs)) or NAMES,
        tokens=args.tokens,
        steps=args.steps,
        lr=args.lr,
        **given,
    )
    output = args.output or (None if subject.source is None else Path(f"{_base(subject.source)}-repaired"))
    if output is None:
        raise ConfigError("repair: name the folder for the repaired model with --output")
    mended.check_output(output, subject)
    record = repair(subject, place, asked, say=say)
    if record["accepted"] is not None:
        say(f"written: {mended.write(subject, output, record)}")
    if args.json:
        print(json.dumps(record | {"output": str(output) if record["accepted"] else None}))
    else:
        _print(record)
    return 0 if record["accepted"] is not None else 1


def _trained_on(source: Path | None) -> dict[str, list[str]]:
    """The texts that the run's recipe names."""
    from fallow.training.runfolder import RunFolder

    recipe = ((RunFolder(source.parent).read() or {}) if source else {}).get("recipe") or {}
    return {name: list(recipe.get(name) or []) for name in ("train_data", "eval_data")}


def _base(source: Path) -> Path:
    """The run's folder of a run's model, else the model's own."""
    return source.parent if (source.parent / "run.json").is_file() else source


def _diagnosis(file: Path) -> dict[str, Any]:
    file = file / "diagnosis.json" if file.is_dir() else file
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; fallow diagnose writes one") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} is no readable diagnosis ({type(error).__name__}); run fallow diagnose again"
        ) from None
    if not isinstance(found, dict) or found.get("kind") != "diagnosis":
        raise ConfigError(f"{file} is no diagnosis; give the diagnosis.json that fallow diagnose wrote")
    return found


def _layer(args: Any, diagnosis: dict[str, Any]) -> int:
    """Which layer. Raises ConfigError: none is given, or the diagnosis blames none."""
    if args.layer is not None:
        return args.layer
    if not diagnosis:
        raise ConfigError("repair: which layer? give --layer L, or --diagnosis FILE of fallow diagnose")
    if not diagnosis.get("sweep"):
        raise ConfigError(
            "repair: the diagnosis found no gap, so there is nothing to repair; --layer L repairs all the same"
        )
    if not diagnosis["sweep"]["local"]:
        raise ConfigError(
            "repair: the diagnosis blames no single layer; --layer L repairs one all the same, e.g."
            f" {diagnosis['sweep']['layer']}, or train on at a longer context"
        )
    return int(diagnosis["sweep"]["layer"])


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="fallow repair",
        description=(__doc__ or "").split("\n")[0],
        epilog="Repairs, cheapest first: keep (more channels), tilt (a bias per channel), refit (the predictor),"
        " finetune (FFN and predictor to the dense output), lm (both on the text). RULER's documents only judge.",
    )
    add_subject(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layer", type=int, metavar="L", help="the layer to repair, from 0")
    which.add_argument(
        "--diagnosis", type=Path, metavar="FILE", help="take layer, tasks and lengths from fallow diagnose"
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="plain text to learn from (the run's)")
    parser.add_argument(
        "--held-data", nargs="+", default=[], metavar="FILE", help="other text, that judges (the run's)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder for the repaired model (RUN-repaired)")
    parser.add_argument("--repairs", nargs="+", default=[], metavar="NAME", help="only these of the five")
    parser.add_argument(
        "--target", type=float, default=0.8, metavar="SHARE", help="of the lost score, that is enough (0.8)"
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="RULER tasks (default: the offline six)")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="tokens of the documents (1024 2048)")
    parser.add_argument("--held-lengths", nargs="+", type=int, metavar="N", help="more that only judge (those between)")
    parser.add_argument("--documents", type=int, default=8, metavar="N", help="per task and length (8)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the documents (the diagnosis's, or 0)")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="of text to learn from (16384)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of each repair that learns (100)")
    parser.add_argument("--lr", type=float, default=1e-4, metavar="RATE", help="of repairs that train weights (1e-4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, width=140)
    table = Table(title=f"layer {record['layer']}: {record['to_win']:.3f} nats to win", title_justify="left")
    for name in ("repair", "back", "recall", "outcome", "why"):
        table.add_column(name, justify="right" if name in ("back", "recall") else "left")
    for told in record["tries"]:
        back = "-" if told["recovered"] is None else f"{told['recovered']:.0%}"
        recall = f"{told['recall']:.0%}" if "recall" in told else "-"
        table.add_row(told["what"], back, recall, told["outcome"], told.get("reason") or "")
    console.print(table)
    console.print(record["summary"])
