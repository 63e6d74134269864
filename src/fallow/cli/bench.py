"""`fallow bench NAME`: time a method's steps against the fastest dense form and say where it breaks even.

The numbers come from `fallow.bench.NAME.run`; here they are only printed, as JSON or as a table. A red correctness
gate prints no number at all: a fast wrong answer is not a speed-up.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from fallow.cli import VerbParser
from fallow.errors import ConfigError

_SWEPT = {"sat": "omit", "smet": "density", "ssd": "share", "upcycle": "share"}
"""What each benchmark varies."""
BENCHES = tuple(_SWEPT)


def bench_command(argv: list[str]) -> int:
    """Run one benchmark and print it. A red correctness gate is a GateError (exit code 1) and nothing is printed."""
    args = _parser().parse_args(argv)
    options = {"cases": args.case, "quick": args.quick} | _own_options(args)
    result = import_module(f"fallow.bench.{args.name}").run(**options)
    if args.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def _own_options(args: Any) -> dict[str, Any]:
    """What only one of the benchmarks takes. Raises ConfigError for an option of another one."""
    own: dict[str, dict[str, Any]] = {
        "sat": {"omit": args.omit, "omit_in": args.omit_in},
        "smet": {"density": args.density},
        "upcycle": {"keep": args.keep},
    }
    for name, options in own.items():
        for option, value in options.items():
            if name != args.name and value is not None:
                flag = option.replace("_", "-")
                raise ConfigError(f"--{flag} is an option of `fallow bench {name}`, not of {args.name}")
    if args.name == "smet":
        return {"densities": tuple(args.density)} if args.density else {}
    if args.name == "upcycle":
        return {"keeps": tuple(args.keep)} if args.keep else {}
    if args.name == "ssd":
        return {}
    found: dict[str, Any] = {"omit_in": args.omit_in or "forward+backward"}
    return found | ({"rates": tuple(args.omit)} if args.omit else {})


def _parser() -> VerbParser:
    parser = VerbParser(prog="fallow bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=BENCHES, help="what to time")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case (repeatable)")
    parser.add_argument("--omit", action="append", type=float, metavar="RATE", help="sat: omission rate (repeatable)")
    parser.add_argument(
        "--omit-in",
        metavar="PASSES",
        help="sat: forward+backward (channels and heads; default), backward or weight_grad (channels)",
    )
    parser.add_argument(
        "--density", action="append", type=float, metavar="SHARE", help="smet: share of weights alive (repeatable)"
    )
    parser.add_argument(
        "--keep", action="append", type=int, metavar="N", help="upcycle: living channels of a bank of 64 (repeatable)"
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
    first = _SWEPT[result["bench"]]
    for name in (first, "dtype", "tokens", "dense ms", "sparse ms", "ratio", "ideal", "ratio/ideal"):
        table.add_column(name, justify="right")
    with_bytes = any("state_bytes" in row for row in result["rows"])
    if with_bytes:
        table.add_column("state bytes", justify="right")
    table.add_column("backend")
    for row in result["rows"]:
        table.add_row(
            f"{row['case']} {row.get('form', '')}".strip(),
            f"{row[first]:g}",
            str(row["dtype"]),
            f"{row['tokens']:,}",
            _milliseconds(row["dense_ms"]),
            _milliseconds(row["sparse_ms"]),
            f"{row['ratio']:.2f}×",
            f"{row['ideal']:.2f}×",
            f"{row['efficiency']:.0%}",
            *([f"{row['state_bytes']:.2f}×" if "state_bytes" in row else "-"] if with_bytes else []),
            str(row["backend"]),
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    for line in break_even_lines(result["break_even"], result["bench"]):
        console.print(line)
    console.print("machine: " + ", ".join(f"{name} {value}" for name, value in result["machine"].items()))


def _milliseconds(ms: float) -> str:
    return f"{ms:,.1f}" if ms >= 10 else f"{ms:.3g}"


def break_even_lines(break_even: dict[str, float | None], bench: str = "sat") -> list[str]:
    """One line per case: from where on sparse is faster than the fastest dense form."""
    found, swept = {
        "sat": ("faster above omit {:.2f}", "rates"),
        "smet": ("tiles are faster below density {:.2f}", "densities"),
        "ssd": ("faster with a share of active experts below {:.2f}", "shares"),
        "upcycle": ("faster up to {:.1f} tokens that decode together", "batches"),
    }[bench]
    none = f"none found at the {swept} measured"
    return [f"break-even {case}: {none if at is None else found.format(at)}" for case, at in break_even.items()]
