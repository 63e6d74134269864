"""Tables and figures of docs/results/upcycle.md, made from the JSON files of benchmarks/results and nothing else.

    python benchmarks/upcycle_figures.py

Writes docs/results/figures/upcycle-*.svg, and replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`;
prose outside of the markers is left alone. Where a JSON file is missing, the block says which command makes it.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from results_page import fill_page, machine_line, main, markdown_table, standalone

from fallow.report.charts import Axis, Series, line_chart

COMMANDS = {
    "upcycle-bench": "fallow bench upcycle --json > benchmarks/results/upcycle-bench.json",
    "upcycle-front": "python benchmarks/upcycle_front.py",
    "upcycle-cpt": "python benchmarks/upcycle_experiments.py main ablations, then … collate",
    "upcycle-ruler": "fallow evaluate RUN --tasks ruler --mode both --json > benchmarks/results/upcycle-ruler.json",
    "upcycle-repair": "python benchmarks/upcycle_repair.py",
}
Data = dict[str, Any]
Block = tuple[str, dict[str, str]]


def make(results: Path, page: Path) -> list[str]:
    """Write all figures beside `page` and fill its tables. Returns one line per table."""
    return fill_page(results, page, TABLES, COMMANDS)


def ffn(data: Data) -> Block:
    """One FFN decoding one token, by shape, dtype and predictor."""
    head = "FFN | weights | predictor | fastest dense ms | sparse ms | ratio | ideal by bytes | of ideal"
    rows = [
        [
            r["case"], r["dtype"], r["form"], f"{r['dense_ms']:,.2f}", f"{r['sparse_ms']:,.2f}",
            f"**{r['ratio']:.2f}×**", f"{r['ideal']:.2f}×", f"{r['efficiency']:.0%}",
        ]
        for r in data["rows"] if r["case"].startswith("ffn") and r["tokens"] == 1
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine_line(data)}", {}


def batches(data: Data) -> Block:
    """The same ratios when several tokens decode together, and where they pass 1."""
    held = [r for r in data["rows"] if r["case"].startswith("ffn")]
    sizes = sorted({r["tokens"] for r in held})
    head = " | ".join(["FFN", "weights", "predictor", *(f"batch {n}" for n in sizes), "pays up to batch"])
    rows = []
    for key in dict.fromkeys((r["case"], r["dtype"], r["form"], r["keep"]) for r in held):
        case, dtype, form, keep = key
        mine = {r["tokens"]: r["ratio"] for r in held if (r["case"], r["dtype"], r["form"], r["keep"]) == key}
        at = data["break_even"].get(f"{case} {dtype} {form} keep {keep}")
        even = "none" if at is None else f"{at:.1f}" if at < max(mine) else f"{max(mine)} and more"
        rows.append([case, dtype, form, *(f"{mine[n]:.2f}×" if n in mine else "–" for n in sizes), even])
    return markdown_table(head, rows), {}


def decode(data: Data) -> Block:
    """Whole models decoding."""
    head = (
        "model | predictor | fastest dense tokens/s | sparse tokens/s | ratio | ideal by bytes | of ideal | against"
        " stock `generate()`"
    )
    rows = [
        [
            r["case"], r["form"], f"{r['dense_tokens_per_second']:.1f} ({r['dense_form'].removeprefix('dense/')})",
            f"{r['sparse_tokens_per_second']:.1f}", f"**{r['ratio']:.2f}×**", f"{r['ideal']:.2f}×",
            f"{r['efficiency']:.0%}", f"**{r['ratio_stock']:.2f}×**" if "ratio_stock" in r else "–",
        ]
        for r in data["rows"] if r["case"].startswith("e2e")
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine_line(data)}", {}


def front(data: Data) -> Block:
    """Loss above dense against bytes, without training."""
    head = (
        "predictor | allocation | keep of 64 | FFN bytes read | at 7B shapes | recall | WikiText-2 | PostgreSQL manual"
    )
    rows = [
        [
            r["kind"], r["allocation"], str(r["keep"]), f"{r['bytes']:.0%}", f"{r['bytes_7b']:.0%}",
            f"{r['mean_recall']:.3f}", f"{r['gap']['wikitext-2']:+.3f}", f"{r['gap']['postgresql']:+.3f}",
        ]
        for r in data["rows"]
    ]  # fmt: skip
    series = []
    for colour, name in enumerate(dict.fromkeys((r["kind"], r["allocation"]) for r in data["rows"])):
        mine = [r for r in data["rows"] if (r["kind"], r["allocation"]) == name and r["gap"]["wikitext-2"] < 1.5]
        points = sorted((r["bytes_7b"], r["gap"]["wikitext-2"]) for r in mine)
        if points:
            label = name[0] if name[1] == "uniform" else f"{name[0]}, {name[1]}"
            series.append(Series(name=label, colour=colour % 7, points=points, marked=True))
    axes = Axis(title="FFN bytes read, of dense, at 7B shapes"), Axis(title="loss above dense, nats (WikiText-2)")
    found = re.search(r'<svg class="chart wide".*?</svg>', line_chart("front", series, *axes), flags=re.S)
    if found is None:
        raise ValueError("nothing to draw")
    dense = ", ".join(f"{name} {loss:.4f}" for name, loss in data["dense"].items())
    note = f"Dense: {dense} nats per token, {data['tokens']:,} tokens each. {machine_line(data)}"
    return f"{markdown_table(head, rows)}\n\n{note}", {"upcycle-front": standalone(found[0])}


def cpt(data: Data) -> Block:
    """What training wins back."""
    runs = {r["arm"]: r for r in data["runs"]}
    head = "arm | steps | recall | WikiText-2 dense, sparse, gap | PostgreSQL manual | technical English"
    rows = []
    for name, r in runs.items():
        companion = runs.get("dense-short" if name.endswith("-short") else "dense")
        recall = f"{statistics.fmean(r['looks'][-1]['recall']):.3f}" if r["looks"] else "–"
        cells = [name, str(r["totals"]["steps"]), recall]
        for text, losses in r["losses"].items():
            sparse = losses.get("sparse")
            base = companion["losses"][text]["dense"] if companion else None
            gap = f", **{sparse - base:+.3f}**" if sparse is not None and base is not None else ""
            cells.append(f"{losses['dense']:.3f}" + (f", {sparse:.3f}{gap}" if sparse is not None else ""))
        rows.append(cells)
    recipe = data["recipe"]
    tokens = recipe["seq_len"] * recipe["batch_size"] * recipe["accumulate"]
    note = f"Gap: sparse, less the dense companion at equal tokens, nats. {tokens:,} tokens a step."
    return f"{markdown_table(head, rows)}\n\n{note}", {}


def ruler(data: Data) -> Block:
    """RULER, both modes, as `fallow evaluate` printed it."""
    head = "task | length | dense | sparse | sparse - dense"
    rows = [
        [
            r["task"],
            str(r["length"]),
            f"{r['dense']['mean']:.3f}",
            f"{r['sparse']['mean']:.3f}",
            f"{r['difference']:+.3f}",
        ]
        for r in data["rows"]
    ]
    return markdown_table(head, rows), {}


def repair(data: Data) -> Block:
    """A planted fault, found and mended."""
    head = "figure | value"
    rows = [[name, str(value)] for name, value in data["figures"].items()]
    return f"{markdown_table(head, rows)}\n\n{machine_line(data)}", {}


TABLES = [
    ("ffn", ("upcycle-bench",), ffn),
    ("batches", ("upcycle-bench",), batches),
    ("decode", ("upcycle-bench",), decode),
    ("front", ("upcycle-front",), front),
    ("cpt", ("upcycle-cpt",), cpt),
    ("ruler", ("upcycle-ruler",), ruler),
    ("repair", ("upcycle-repair",), repair),
]

if __name__ == "__main__":
    raise SystemExit(main(make, "upcycle.md", __doc__))
