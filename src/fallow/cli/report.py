"""`fallow report RUN…`: one self-contained HTML page about runs and comparisons."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fallow.cli import VerbParser


def report_command(argv: list[str]) -> int:
    """Write the page and print where it is. Raises DataError (exit code 2) where a folder holds no run."""
    args = _parser().parse_args(argv)
    from fallow.report import build_report

    report = build_report(args.runs)
    for note in report.notes:
        print(f"fallow: warning: {note}", file=sys.stderr)
    out = report.write(args.out or _default_out(args.runs))
    if args.json:
        print(json.dumps({"report": str(out), **report.summary}))
    else:
        print(f"{report.summary['headline']}\n{report.summary['detail']}\n{out}")
    return 0


def _parser() -> VerbParser:
    parser = VerbParser(prog="fallow report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a comparison's")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in RUN, or here for several")
    parser.add_argument("--json", action="store_true", help="print the page's figures as one JSON object")
    return parser


def _default_out(runs: list[Path]) -> Path:
    folder = runs[0] if runs[0].is_dir() else runs[0].parent
    return (folder if len(runs) == 1 else Path()) / "report.html"
