"""Figures and tables of docs/results/sat.md, made from the JSON files of benchmarks/results and nothing else.

    python benchmarks/sat_figures.py

Writes docs/results/figures/*.svg, and replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`; prose
outside of the markers is left alone. Where a JSON file is missing, the block says which command makes it. SVG through
fallow's own report code: a plotting library would be a dependency of the documentation alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results_page import fill, machine_line, main, markdown_table
from sat_charts import bench_chart, curves_chart, front_chart

from fallow.report.charts import Axis

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "sat-bench": "fallow bench sat --json > benchmarks/results/sat-bench.json",
    "sat-cpt": "python benchmarks/sat_experiments.py cpt --seeds 0 1",
    "sat-sft": "python benchmarks/sat_experiments.py sft --seeds 0 1",
}
_CLOCKS = {
    "interleaved": "Seconds: each run's steps at the pace measured with all arms interleaved (`sat_pace.py`).",
    "wall": "Seconds: each run's own clock; the arms ran one after the other.",
}

Data = dict[str, Any]


def make(results: Path, page: Path) -> list[str]:
    """Write all figures beside `page` and fill its tables. Returns one line per thing done or missing.

    Raises:
        ValueError: a JSON file is none, or the page lacks a marker. KeyError: a figure is missing in a JSON file.
    """
    figures = page.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8")
    said: list[str] = []
    for name, table, drawings in (
        ("sat-bench", bench_table, {"sat-bench": bench_chart}),
        ("sat-cpt", experiment_table, _experiment_charts("sat-cpt")),
        ("sat-sft", experiment_table, _experiment_charts("sat-sft")),
    ):
        source = results / f"{name}.json"
        short = name.removeprefix("sat-")
        if not source.exists():
            text = fill(text, short, f"Not measured yet: `{COMMANDS[name]}` makes `benchmarks/results/{name}.json`.")
            said.append(f"{name}: no {source.name}; {COMMANDS[name]} makes it")
            continue
        data = json.loads(source.read_text(encoding="utf-8"))
        links = []
        for figure, draw in drawings.items():
            (figures / f"{figure}.svg").write_text(draw(data), encoding="utf-8")
            links.append(f"![{figure}](figures/{figure}.svg)")
        text = fill(text, short, "\n\n".join([table(data), machine_line(data), *links]))
        said.append(f"{name}: table {short}, {len(links)} figures")
    page.write_text(text, encoding="utf-8")
    return said


def bench_table(data: Data) -> str:
    """One row per shape and rate of `fallow bench sat --json`."""
    head = (
        "case | omitted in | omit | heads | tokens | dense ms | SAT ms | ratio | ideal | of ideal | selection"
        " | dense form | SAT form"
    )
    rows = [
        [
            row["case"], row["omit_in"], f"{row['omit']:.2f}", f"{row['heads']:.2f}", f"{row['tokens']:,}",
            f"{row['dense_ms']:,.0f}", f"{row['sparse_ms']:,.0f}",
            f"**{row['ratio']:.2f}×**", f"{row['ideal']:.2f}×", f"{row['efficiency']:.0%}",
            f"{row['selection_share']:.1%}", row["dense_form"].removeprefix("dense/"),
            row["sparse_form"].removeprefix("sparse/"),
        ]
        for row in data["rows"]
    ]  # fmt: skip
    even = "; ".join(f"{case} {rate:.2f}" for case, rate in data["break_even"].items() if rate is not None)
    line = f"\n\nBreak-even omission rate, on the line through two rates: {even}." if even else ""
    return markdown_table(head, rows) + line


def experiment_table(data: Data) -> str:
    """One row per arm of a `sat_experiments.py` JSON: means over seeds, range in brackets."""
    head = (
        "arm | seeds | held-out loss | gap, equal tokens | gap, equal seconds | against"
        " | tokens/s | × dense | less time | × dense by each run's clock | peak GiB"
    )
    rows = [
        [
            row["arm"], str(len(row["seeds"])), _figure(row["eval_loss"], ".4f"),
            _figure(row["gap_equal_tokens"], "+.4f"), _figure(row["gap_equal_seconds"], "+.4f"),
            ", ".join(row["gap_equal_seconds_against"]) or "–",
            _figure(row["tokens_per_second"], ",.0f", ranged=False), _figure(row["ratio"], ".3f"),
            _figure(row["less_time_percent"], ".1f", unit=" %"), _figure(row["wall_ratio"], ".2f"),
            _figure(row["peak_memory_mb"], ".2f", ranged=False, scale=1024),
        ]
        for row in data["summary"]
    ]  # fmt: skip
    recipe = data["recipe"]
    note = (
        f"{recipe['steps']} steps of {recipe['batch_size'] * recipe['accumulate']}×{recipe['seq_len']} tokens,"
        f" lr {recipe['lr']:g} {recipe['schedule']}, {data['precision']['dtype']}. {_CLOCKS[data['clock']]}"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def _figure(value: Data | None, form: str, *, unit: str = "", ranged: bool = True, scale: float = 1.0) -> str:
    if value is None:
        return "–"
    words = format(value["mean"] / scale, form) + unit
    if not ranged or format(value["low"], form) == format(value["high"], form):
        return words
    return f"{words} [{value['low'] / scale:{form}} … {value['high'] / scale:{form}}]"


def _experiment_charts(name: str) -> dict[str, Callable[[Data], str]]:
    return {
        f"{name}-seconds": lambda data: curves_chart(data, "seconds", Axis(title="training seconds")),
        f"{name}-tokens": lambda data: curves_chart(data, "tokens", Axis(title="tokens, thousands", scale=1000)),
        f"{name}-front": front_chart,
    }


if __name__ == "__main__":
    raise SystemExit(main(make, "sat.md", __doc__))
