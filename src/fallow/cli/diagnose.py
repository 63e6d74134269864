"""`fallow diagnose MODEL`: which layer breaks long context, by RULER's answers with single layers dense or sparse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fallow.cli import VerbParser
from fallow.cli.evaluate import add_subject, load_subject, say, words, write
from fallow.errors import ConfigError

if TYPE_CHECKING:
    from fallow.evaluation.subject import Subject

LENGTHS = (1024, 2048, 4096)
FILE = "diagnosis.json"


def diagnose_command(argv: list[str]) -> int:
    """Diagnose, write diagnosis.json and a page, and print. Raises ConfigError before anything is computed."""
    args = _parser().parse_args(argv)
    from fallow.evaluation.diagnosis import Asked, diagnose

    given = {"tasks": tuple(words(args.tasks))} if args.tasks else {}
    asked = Asked(
        lengths=tuple(args.lengths or LENGTHS), documents=args.documents, sweep=args.sweep, seed=args.seed, **given
    )
    subject = load_subject(args, verb="diagnose")
    if not args.lengths and subject.longest is not None:
        asked.lengths = tuple(length for length in LENGTHS if length <= subject.longest)
        if not asked.lengths:
            raise ConfigError(f"diagnose: {subject.name} has a context of {subject.longest} tokens; give --lengths")
    file = output_file(args.output, args.model, subject)
    result = diagnose(subject, asked, say=say)
    if file is not None:
        write(file, result)
        from fallow.report.diagnosis import write_page

        say(f"{file}; {write_page(result, file.with_suffix('.html'))}")
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def output_file(asked: Path | None, model: str, subject: Subject) -> Path | None:
    """Where results go: where asked, else beside the run or model; nowhere for a model that is no folder."""
    if asked is not None:
        return asked if asked.suffix == ".json" else asked / FILE
    if subject.source is None:
        return None
    from fallow.training.finished import find_model

    return find_model(Path(model), verb="diagnose")[0] / FILE


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="fallow diagnose",
        description=(__doc__ or "").split("\n")[0],
        epilog="Writes diagnosis.json and diagnosis.html; `fallow report RUN` shows it too, `fallow repair` reads it.",
    )
    add_subject(parser)
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="RULER tasks (default: the offline six)")
    parser.add_argument(
        "--lengths", nargs="+", type=int, metavar="N", help="tokens of the documents (1024 2048 4096 where they fit)"
    )
    parser.add_argument("--documents", type=int, default=8, metavar="N", help="per task and length (8)")
    parser.add_argument("--sweep", type=int, default=12, metavar="N", help="documents that the sweeps use, in all (12)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the documents (0)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="a folder for both files, or a .json file (default: beside the model)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 140)
    table = Table(title="1. nats per answer token, sparse over dense", title_justify="left")
    for name in ("task", "length", "dense", "sparse", "gap", ""):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for gap in result["gaps"]:
        held = gap["gap"]
        shown = f"{held['mean']:+.3f} [{held['low']:+.3f}, {held['high']:+.3f}]"
        mark = "significant" if gap["significant"] else ""
        table.add_row(gap["task"], str(gap["length"]), f"{gap['dense']:.3f}", f"{gap['sparse']:.3f}", shown, mark)
    console.print(table)
    if result["sweep"]:
        held = result["sweep"]
        table = Table(title=f"2. layers, nats over {held['documents']} documents", title_justify="left")
        for name in ("place", "dense: brings back", "sparse: costs"):
            table.add_column(name, justify="right", no_wrap=True)
        restore, mirror = held["restore"], held["mirror"]
        for place, (a, b) in enumerate(zip(restore["order"][:5], mirror["order"][:5], strict=True)):
            table.add_row(
                str(place + 1), f"layer {a}  {restore['nats'][a]:+.3f}", f"layer {b}  {mirror['nats'][b]:+.3f}"
            )
        console.print(table)
        table = Table(title=f"3. changes to layer {held['layer']} alone", title_justify="left")
        for name in ("change", "brings back, nats", "share of dense"):
            table.add_column(name, justify="left" if name == "change" else "right", no_wrap=True)
        for name, found in result["causes"]["changes"].items():
            nats = found["nats"]
            shown = f"{nats['mean']:+.3f} [{nats['low']:+.3f}, {nats['high']:+.3f}]"
            table.add_row(name, shown, f"{found['share']:.0%}")
        console.print(table)
    console.print(result["verdict"])
