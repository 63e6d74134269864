"""Tables and figures of docs/results/ssd.md, made from the JSON files of benchmarks/results and nothing else.

    python benchmarks/ssd_figures.py

Writes docs/results/figures/ssd-*.svg, and replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`;
prose outside of the markers is left alone. Where a JSON file is missing, the block says which command makes it.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results_page import fill_page, machine_line, main, markdown_table, standalone
from ssd_arms import ABLATIONS, BROAD, DEEP, LARGE, MAIN
from ssd_collate import Summary, base_of, gap_at_equal_seconds, gaps, seconds_to_dense, summarise

from fallow.report.charts import Axis, Series, line_chart

COMMANDS = {
    "ssd-bench": "fallow bench ssd --json > benchmarks/results/ssd-bench.json",
    "ssd-pace": "python benchmarks/ssd_pace.py",
    "ssd-pace-no-amx": "ONEDNN_MAX_CPU_ISA=AVX512_CORE python benchmarks/ssd_pace.py --output …/ssd-pace-no-amx.json",
    "ssd-pretrain": "python benchmarks/ssd_experiments.py main deep ablations --seeds 0 1, then … collate",
    "ssd-export": "python benchmarks/ssd_export.py",
    "ssd-relufy": "python benchmarks/ssd_relufy.py",
}
Data = dict[str, Any]
Block = tuple[str, dict[str, str]]


def make(results: Path, page: Path) -> list[str]:
    """Write all figures beside `page` and fill its tables. Returns one line per table."""
    return fill_page(results, page, TABLES, COMMANDS)


def ffn(data: Data) -> Block:
    """`expert_ffn` alone, a quarter of the experts; all shares are in the JSON."""
    head = "FFN | dtype | experts | active | dense ms | experts ms | ratio | ideal | of ideal | break-even share"
    rows = []
    for r in data["rows"]:
        if r["case"].startswith("step") or r["share"] != 0.25:
            continue
        even = data["break_even"].get(f"{r['case']} {r['dtype']} E{r['experts']}")
        rows.append(
            [
                r["case"], r["dtype"], str(r["experts"]), str(r["active"]), f"{r['dense_ms']:,.1f}",
                f"{r['sparse_ms']:,.1f}", f"**{r['ratio']:.2f}×**", f"{r['ideal']:.2f}×", f"{r['efficiency']:.0%}",
                "never" if even is None else f"{even:.0%}",
            ]
        )  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine_line(data)}", {}


def steps(data: Data) -> Block:
    """Whole training steps."""
    head = "case | dtype | tokens | E / k | fastest dense ms | experts ms | ratio | ideal | of ideal | same dtype"
    rows = [
        [
            r["case"], r["dtype"], f"{r['tokens']:,}", f"{r['experts']} / {r['active']}",
            f"{r['dense_ms']:,.0f} ({r['dense_form'].removeprefix('dense/')})", f"{r['sparse_ms']:,.0f}",
            f"**{r['ratio']:.2f}×**", f"{r['ideal']:.2f}×", f"{r['efficiency']:.0%}", f"{r['ratio_same_dtype']:.2f}×",
        ]
        for r in data["rows"] if r["case"].startswith("step")
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine_line(data)}", {}


def pretrain(data: Data, pace: Data, slow: Data) -> Block:
    """Final losses of every arm in both modes, with their seconds on a CPU with AMX and on one without."""
    fast, slower = summarise(data, pace), summarise(data, slow)
    head = (
        "arm | seeds | sparse steps | loss, dense mode | of dense | loss, MoE mode | of dense | seconds | gap at equal"
        " seconds | seconds, no AMX | gap at equal seconds"
    )
    rows = []
    for arm in (*MAIN, *BROAD, *LARGE, *DEEP):
        if (s := fast.get(arm.name)) is None:
            continue
        cells = [
            arm.name, str(len(s.dense)), f"{s.sparse_share:.0%}", _ranged(s.dense.values(), ".4f"),
            _ranged(gaps(fast, arm.name), "+.2%"), _ranged(s.sparse.values(), ".4f"),
            _ranged(gaps(fast, arm.name, "sparse"), "+.2%"),
        ]  # fmt: skip
        for of in (fast, slower):
            if arm.name not in of:
                cells += ["–", "–"]
                continue
            base = of[base_of(arm.name)]
            cells.append(f"{of[arm.name].mean('seconds') / base.mean('seconds'):.2f}×")
            gap = [] if arm.name == base_of(arm.name) else gap_at_equal_seconds(of, arm.name)
            cells.append(_ranged(gap, "+.3f"))
        rows.append(cells)
    r = data["recipe"]
    forms = {
        "half of the experts": ["ssd-half-early", "ssd-half-120"],
        "a quarter, one partition": ["fixed-partition", "fixed-partition-120"],
        "2 of 8 experts, one partition, d 384": ["broad-fixed-eight", "broad-fixed-eight-120"],
        "a quarter, one partition, d 1024": ["large-fixed-115", "large-fixed-120"],
        "the same at the rate that is dense's better one": ["large-fixed-115-lr50", "large-fixed-120-lr50"],
    }
    reached = []
    for name, runs in forms.items():
        if all(a in fast for a in runs):
            both = [
                _ranged(seconds_to_dense(of, runs), ".2f") if runs[0] in of else "not timed" for of in (fast, slower)
            ]
            reached.append(f"{name} {both[0]} with AMX, {both[1]} without")
    note = (
        f"{r['steps']} steps of {r['batch_size']}×{r['seq_len']} tokens, {data['runs'][0]['dtype']}; means over seeds"
        f" [range]. Seconds are of dense's at the prices of `ssd_pace.py`, {pace['threads']} thread: bf16 with AMX, and"
        f" fp32 with AMX turned off. Seconds in which dense's final loss is reached, of dense's: {'; '.join(reached)}."
    )
    drawn = {"ssd-front": front_chart(fast), "ssd-front-no-amx": front_chart(slower)}
    return f"{markdown_table(head, rows)}\n\n{note}", drawn


def ablations(data: Data, pace: Data) -> Block:
    """One thing changed at a time, against `ssd`."""
    of = summarise(data, pace)
    head = "arm | seeds | loss, dense mode | against ssd | loss, MoE mode | against ssd | seconds, of ssd's"
    rows = []
    for arm in ABLATIONS:
        if (s := of.get(arm.name)) is None or "ssd" not in of:
            continue
        base = of["ssd"]
        seconds = statistics.fmean(s.seconds.values()) / statistics.fmean(base.seconds.values())
        dense = [x - base.dense[k] for k, x in s.dense.items() if k in base.dense]
        sparse = [x - base.sparse[k] for k, x in s.sparse.items() if k in base.sparse]
        rows.append(
            [
                arm.name, str(len(s.dense)), _ranged(s.dense.values(), ".4f"), _ranged(dense, "+.4f"),
                _ranged(s.sparse.values(), ".4f"), _ranged(sparse, "+.4f"), f"{seconds:.2f}×",
            ]
        )  # fmt: skip
    if not rows:
        return "Ablations were not run yet: `python benchmarks/ssd_experiments.py ablations --seeds 0 1`.", {}
    return markdown_table(head, rows), {}


def pace(data: Data, slow: Data) -> Block:
    """Prices of the experiments' steps."""
    head = "form | step ms, bf16 with AMX | of dense | quartiles | step ms, fp32 without | of dense | quartiles"
    rows = []
    slower = {r["form"]: r for r in slow["rows"]}
    for row in data["rows"]:
        cells = [row["form"]]
        for r in (row, slower.get(row["form"])):
            if r is None:
                cells += ["–", "–", "–"]
                continue
            quartiles = "–".join(f"{q:.2f}" for q in r["quartiles"])
            cells += [f"{r['step_ms']:.0f}", f"{r['of_dense']:.2f}×", quartiles]
        rows.append(cells)
    for name, ms in data["prices_ms"].items():
        if name.endswith(("observation", "partition")):
            theirs = f"{slow['prices_ms'][name]:.0f}" if name in slow["prices_ms"] else "–"
            rows.append([name, f"{ms:.0f}", "", "", theirs, "", ""])
    return f"{markdown_table(head, rows)}\n\n{machine_line(data)}", {}


def export(data: Data) -> Block:
    """The same weights dense and as experts, in one stock engine."""
    head = "engine | dtype | phase | experts by | threads | dense tokens/s | experts tokens/s | ratio"
    rows = [
        [
            r["engine"], r["dtype"], r["phase"], r["form"], str(r["threads"]),
            f"{r['dense_tokens_per_s']:,.1f}", f"{r['moe_tokens_per_s']:,.1f}", f"**{r['ratio']:.2f}×**",
        ]
        for r in data["rows"]
    ]  # fmt: skip
    s = data["settings"]
    shape = f"{s['layers']} layers, d {s['width']}, F {s['channels']}, E {s['experts']} / k {s['active']}"
    return f"{markdown_table(head, rows)}\n\n{shape}, prompt of {s['prompt']}. {machine_line(data)}", {}


def relufy(data: Data) -> Block:
    """What ReLU in the place of SiLU costs a trained model."""
    head = "arm | tokens trained | held-out loss | zeros | loss with a quarter of the experts"
    rows = [
        [
            r["arm"], f"{r['tokens']:,}", f"{r['loss']:.4f}", "–" if r["zeros"] is None else f"{r['zeros']:.0%}",
            "–" if r["sparse_loss"] is None else f"{r['sparse_loss']:.4f}",
        ]
        for r in data["rows"]
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine_line(data)}", {}


def front_chart(of: dict[str, Summary]) -> str:
    """Final loss against seconds: dense runs of several lengths, and every form."""
    half = [a for a in ("ssd-half-early", "ssd-half-120") if a in of]
    lines = {
        "dense": [a for a in of if a == "dense" or a.startswith("dense-")],
        "SSD, half of the experts": half,
        "SSD, a quarter": ["ssd"],
        "one partition, a quarter": [a for a in ("fixed-partition", "fixed-partition-120") if a in of],
        "always sparse, MoE mode": ["always-sparse"],
        "random experts": ["random-partition"],
        "native MoE": ["moe"],
        "small dense": ["small"],
    }
    series = []
    for colour, (name, arms) in enumerate(lines.items()):
        what = "sparse" if name.endswith("mode") else "dense"
        points = sorted((statistics.fmean(of[a].seconds.values()), of[a].mean(what)) for a in arms if a in of)
        if points:
            series.append(Series(name=name, colour=colour, points=points, marked=True))
    body = line_chart("front", series, Axis(title="seconds"), Axis(title="held-out loss, nats per token"))
    found = re.search(r'<svg class="chart wide".*?</svg>', body, flags=re.S)
    if found is None:
        raise ValueError("nothing to draw")
    return standalone(found[0])


def _ranged(values: Any, form: str) -> str:
    numbers: Sequence[float] = list(values)
    if not numbers:
        return "–"
    mean = format(statistics.fmean(numbers), form)
    return mean if len(numbers) == 1 else f"{mean} [{min(numbers):{form}} … {max(numbers):{form}}]"


TABLES = [
    ("ffn", ("ssd-bench",), ffn),
    ("steps", ("ssd-bench",), steps),
    ("pretrain", ("ssd-pretrain", "ssd-pace", "ssd-pace-no-amx"), pretrain),
    ("ablations", ("ssd-pretrain", "ssd-pace"), ablations),
    ("pace", ("ssd-pace", "ssd-pace-no-amx"), pace),
    ("export", ("ssd-export",), export),
    ("relufy", ("ssd-relufy",), relufy),
]

if __name__ == "__main__":
    raise SystemExit(main(make, "ssd.md", __doc__))
