"""`fallow compare RECIPE [--setting value …]`: every arm of a recipe on the same data, then a table and a report."""

from __future__ import annotations

import json
from typing import Any

from fallow.cli.train import settings_help, split

_HELP = """usage: fallow compare RECIPE [--overwrite] [--json] [--SETTING VALUE ...]

Run the arms of the YAML file RECIPE one after the other, same data order and seed; finished arms are skipped.
Writes OUTPUT/NAME/compare.json and report.html.

  --overwrite  run every arm anew
  --json       print one JSON object (compare.json and the report's path) on stdout, everything else on stderr

settings (default), then the settings of each arm's method:
"""


def compare_command(argv: list[str]) -> int:
    """Compare arms. Returns 0 when all finished, 1 when Ctrl-C interrupted one; raises FallowError otherwise."""
    if not argv or {"-h", "--help"} & set(argv):
        print(_HELP + settings_help())
        return 0 if argv else 2
    path, options, flags = split(argv, switches=("json", "overwrite"))
    from fallow.training.settings import load_file, parse_flags

    file, settings = load_file(path), parse_flags(flags)
    from fallow.training.compare import compare, resolve_arms

    arms = resolve_arms(file, settings)
    from fallow.report import write_report
    from fallow.training.progress import Display
    from fallow.training.quiet import quiet

    quiet()
    as_json = "json" in options
    display = Display(to_stderr=as_json)
    command = " ".join(["fallow compare", *argv])
    result, report = compare(
        arms, command=command, display=display, write_report=write_report, overwrite="overwrite" in options
    )
    if report is not None:
        for line in lines(result):
            display.say(line)
        display.say(f"report: {report}")
    if as_json:
        print(json.dumps(result | {"report": str(report) if report else None}))
    return 0 if report is not None else 1


def lines(result: dict[str, Any]) -> list[str]:
    """The rows of compare.json as a small table; gaps are against the baseline, positive is worse."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    width = max(len("arm"), *(len(row["arm"]) for row in result["rows"]))
    head = f"{'arm':<{width}}  held-out  tokens/s  speed-up   seconds  equal tokens  equal seconds"
    out = ["", f"baseline: {result['baseline']}; loss gaps in nats per token, + is worse", head]
    for row in result["rows"]:
        speedup = shown(row["speedup_tokens_per_second"], ".2f")
        out.append(
            f"{row['arm']:<{width}}  {row['eval_loss']:>8.4f}  {row['tokens_per_second']:>8,.0f}"
            f"  {speedup:>7}×  {row['train_seconds']:>8,.0f}  {shown(row['loss_gap_equal_tokens'], '+.4f'):>12}"
            f"  {shown(row['loss_gap_equal_seconds'], '+.4f'):>13}"
        )
    return out
