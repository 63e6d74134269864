"""`fallow bench NAME`: time a method's steps against the fastest dense form and say where it breaks even.

The numbers come from `fallow.bench.NAME.run`; here they are only printed, as JSON or as a table. A red correctness
gate prints no number at all: a fast wrong answer is not a speed-up.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from fallow.cli import VerbParser

BENCHES = ("sat",)


def bench_command(argv: list[str]) -> int:
    """Run one benchmark and print it. A red correctness gate is a GateError (exit code 1) and nothing is printed."""
    args = _parser().parse_args(argv)
    options = {"cases": args.case, "quick": args.quick, "omit_in": args.omit_in}
    if args.omit:
        options["rates"] = tuple(args.omit)
    result = import_module(f"fallow.bench.{args.name}").run(**options)
    if args.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def _parser() -> VerbParser:
    parser = VerbParser(prog="fallow bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=BENCHES, help="what to time")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case (repeatable)")
    parser.add_argument("--omit", action="append", type=float, metavar="RATE", help="omission rate (repeatable)")
    parser.add_argument(
        "--omit-in",
        default="forward+backward",
        metavar="PASSES",
        help="forward+backward (channels and heads), backward or weight_grad (channels)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing compiled: a look, not a result")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"fallow bench {result['bench']} (correctness gate: {result['gate']})"
    table = Table(title=title, title_justify="left")
    table.add_column("case", no_wrap=True)
    for name in ("omit", "dtype", "tokens", "dense ms", "sparse ms", "ratio", "ideal", "ratio/ideal"):
        table.add_column(name, justify="right")
    table.add_column("backend")
    for row in result["rows"]:
        table.add_row(
            str(row["case"]),
            f"{row['omit']:g}",
            str(row["dtype"]),
            f"{row['tokens']:,}",
            f"{row['dense_ms']:,.1f}",
            f"{row['sparse_ms']:,.1f}",
            f"{row['ratio']:.2f}×",
            f"{row['ideal']:.2f}×",
            f"{row['efficiency']:.0%}",
            str(row["backend"]),
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    for line in break_even_lines(result["break_even"]):
        console.print(line)
    console.print("machine: " + ", ".join(f"{name} {value}" for name, value in result["machine"].items()))


def break_even_lines(break_even: dict[str, float | None]) -> list[str]:
    """One line per case: the omission rate above which sparse is faster than the fastest dense form."""
    return [
        f"break-even {case}: "
        + ("none found at the rates measured" if rate is None else f"faster above omit {rate:.2f}")
        for case, rate in break_even.items()
    ]
