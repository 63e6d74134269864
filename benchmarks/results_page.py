"""What the pages of docs/results share: tables between markers, drawings that stand alone, and the command line.

A page's prose is written by hand; what stands between `<!-- table: NAME -->` and `<!-- end -->` is made from JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fallow.report.charts import COLOURS

ROOT = Path(__file__).resolve().parent.parent

_CSS = """
svg { --card: #fff; --ink: #1b1f1d; --soft: #565d59; --faint: #e6e4dd; --hair: #d6d3ca; background: var(--card);
  --c0: #23282b; --c1: #0a62c4; --c2: #c2410c; --c3: #0b7a6c; --c4: #9d2f86; --c5: #876000; --c6: #5a55c8; }
@media (prefers-color-scheme: dark) {
svg { --card: #1a1e1b; --ink: #eceee9; --soft: #a7afa9; --faint: #2a2f2b; --hair: #3a413c;
  --c0: #e8ebe6; --c1: #6cb0ff; --c2: #ff9d5c; --c3: #3ccfb4; --c4: #f08bd0; --c5: #e3b341; --c6: #b0a8ff; } }
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft); }
.title { font-weight: 600; } .value { fill: var(--ink); }
.line { fill: none; stroke: currentColor; stroke-width: 2.1; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 5; }
.dot { fill: currentColor; stroke: var(--card); } .band { fill: currentColor; opacity: .15; } .cursor { display: none; }
.leader { stroke: currentColor; opacity: .7; stroke-dasharray: 1 3; } .grid { stroke: var(--faint); }
.axis { stroke: var(--hair); } .whisker { stroke: currentColor; stroke-width: 1.4; opacity: .6; }
.label { fill: currentColor; font-weight: 500; paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.bar { fill: currentColor; } .ideal { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 3 2; }
""" + " ".join(f".c{i} {{ color: var(--c{i}); }}" for i in range(COLOURS))

Data = dict[str, Any]


def main(
    make: Callable[[Path, Path], list[str]], page: str, description: str | None, argv: Sequence[str] | None = None
) -> int:
    """`make(results, page)` from the command line. Exit codes: 0 done, 1 a JSON file or the page cannot be used."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / page)
    options = parser.parse_args(argv)
    try:
        for line in make(options.results, options.page):
            print(line)
    except (OSError, ValueError, KeyError) as error:
        print(f"{parser.prog}: {type(error).__name__}: {error}; make the JSON files anew", file=sys.stderr)
        return 1
    return 0


def fill_page(
    results: Path,
    page: Path,
    tables: Sequence[tuple[str, tuple[str, ...], Callable[..., tuple[str, dict[str, str]]]]],
    commands: dict[str, str],
) -> list[str]:
    """Fill every table of `page` from the JSON files it needs, and write its figures beside the page. Returns one line
    per table.

    Args:
        tables: (name of the table, names of the JSON files, their contents -> (markdown, figures by name)).
        commands: what makes each JSON file.
    """
    figures = page.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8")
    found = {n: json.loads(p.read_text()) for n in commands if (p := results / f"{n}.json").exists()}
    said: list[str] = []
    for table, needs, build in tables:
        missing = [n for n in needs if n not in found]
        if missing:
            lines = "; ".join(f"`{commands[n]}` makes `benchmarks/results/{n}.json`" for n in missing)
            text = fill(text, table, f"Not measured yet: {lines}.")
            said.append(f"{table}: missing {', '.join(missing)}")
            continue
        block, drawings = build(*(found[n] for n in needs))
        for name, drawing in drawings.items():
            (figures / f"{name}.svg").write_text(drawing, encoding="utf-8")
        links = [f"![{name}](figures/{name}.svg)" for name in drawings]
        text = fill(text, table, "\n\n".join([block, *links]))
        said.append(f"{table}: done, {len(drawings)} figures")
    page.write_text(text, encoding="utf-8")
    return said


def fill(text: str, name: str, block: str) -> str:
    """`text` with `block` between the markers of table `name`. Raises ValueError when they are not there once."""
    pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
    filled, count = re.subn(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"the page needs `<!-- table: {name} -->` … `<!-- end -->` once, found {count}")
    return filled


def markdown_table(head: str, rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * head.count(" | ")]
    return "\n".join([f"| {head} |", *(f"| {' | '.join(cells)} |" for cells in (rule, *rows))])


def machine_line(data: Data) -> str:
    m, others = data["machine"], data.get("elsewhere")
    torch = f", torch {data['versions']['torch']}" if "versions" in data else ""
    words = f"Machine: {m['cpu']}, {m['threads']} threads, {m['memory_gb']} GB{torch}"
    return words + (f"; elsewhere or with other versions: {', '.join(others)}" if others else "") + "."


def standalone(drawing: str) -> str:
    """An `<svg>` of a page as a file of its own, with its styles; hover data left out."""
    body = re.sub(r' data-[a-z]+="[^"]*"', "", drawing)
    return (
        body.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f"><style>{_CSS}</style>", 1)
        + "\n"
    )
