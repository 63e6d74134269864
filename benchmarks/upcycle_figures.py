"""Tables and figures of docs/results/upcycle.md, made from the JSON files of benchmarks/results and nothing else.

    python benchmarks/upcycle_figures.py

Writes docs/results/figures/upcycle-*.svg, and replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`;
prose outside of the markers is left alone. Where a JSON file is missing, the block says which command makes it.
"""

from __future__ import annotations

import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import upcycle_gpu_figures as gpu
from results_page import fill_page, machine_line, main, markdown_table, standalone

from fallow.evaluation.ruler import Scores, difference
from fallow.method import Mode
from fallow.report.charts import Axis, Series, line_chart

RUNS = "runs/experiments/upcycle-cpt"
BEST = f"{RUNS}/quantized"
RULER = "--tasks ruler --lengths 1024 2048 4096 --limit 6"
RESULTS = "benchmarks/results"
REPAIRS = ("upcycle-repair-s2",)
COMMANDS = {
    "upcycle-bench": "fallow bench upcycle --json > benchmarks/results/upcycle-bench.json",
    "upcycle-bench-no-amx": (
        "fallow bench upcycle --case ffn-7b --case ffn-1b --case ffn-135m --case e2e-135m --json"
        " > benchmarks/results/upcycle-bench-no-amx.json"
    ),
    "upcycle-front": "python benchmarks/upcycle_front.py --tokens 8192",
    "upcycle-llamacpp": "python benchmarks/upcycle_llamacpp.py",
    "upcycle-cpt": "python benchmarks/upcycle_experiments.py main ablations, then … collate",
    "gpu/upcycle-nvidia-h200": "python benchmarks/gpu_all.py --only upcycle --part core",
    "gpu/upcycle-cpt": (
        "python benchmarks/upcycle_experiments.py main --set batch_size=4 accumulate=1, then … long --set steps=800,"
        " then … collate --result benchmarks/results/gpu/upcycle-cpt.json"
    ),
    "upcycle-front-trained": (
        f"python benchmarks/upcycle_front.py --model {BEST} --companion {RUNS}/dense --name front-trained"
    ),
    "upcycle-front-compensated": (
        f"python benchmarks/upcycle_front.py --model {RUNS}/compensated --companion {RUNS}/dense"
        " --name front-compensated"
    ),
    "upcycle-ruler": (
        f"fallow evaluate {BEST} --mode sparse --prompts sparse {RULER} --output {RESULTS}/upcycle-ruler.json"
    ),
    "upcycle-ruler-prompts": (
        f"fallow evaluate {BEST} --mode sparse {RULER} --output {RESULTS}/upcycle-ruler-prompts.json"
    ),
    "upcycle-ruler-both": (
        f"fallow evaluate {RUNS}/both --mode sparse --prompts sparse {RULER} --output {RESULTS}/upcycle-ruler-both.json"
    ),
    "upcycle-ruler-both-prompts": (
        f"fallow evaluate {RUNS}/both --mode sparse {RULER} --output {RESULTS}/upcycle-ruler-both-prompts.json"
    ),
    "upcycle-ruler-companion": f"fallow evaluate {RUNS}/dense {RULER} --output {RESULTS}/upcycle-ruler-companion.json",
} | dict.fromkeys(REPAIRS, "python benchmarks/upcycle_repair.py --seed 2")
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
    """Loss above dense against bytes."""
    head = (
        "predictor | allocation | keep of 64 | FFN bytes read | at 7B shapes | recall | WikiText-2 | PostgreSQL manual"
    )
    gaps = ["gap", "gap_companion"] if data.get("companion") else ["gap"]
    if len(gaps) > 1:
        head += " | WikiText-2, above the companion | PostgreSQL manual, above the companion"
    rows = [
        [
            r["kind"], r["allocation"], str(r["keep"]), f"{r['bytes']:.0%}", f"{r['bytes_7b']:.0%}",
            f"{r['mean_recall']:.3f}",
            *(f"{r[gap][text]:+.3f}" for gap in gaps for text in ("wikitext-2", "postgresql")),
        ]
        for r in data["rows"]
    ]  # fmt: skip
    series = []
    uniform = [r for r in data["rows"] if r["allocation"] == "uniform"]  # the others are in the table
    for colour, name in enumerate(dict.fromkeys(r["kind"] for r in uniform)):
        mine = [r for r in uniform if r["kind"] == name and r["gap"]["wikitext-2"] < 1.5]
        points = sorted((r["bytes_7b"], r["gap"]["wikitext-2"]) for r in mine)
        if points:
            series.append(Series(name=name, colour=colour % 7, points=points, marked=True))
    axes = Axis(title="FFN bytes read, of dense, at 7B shapes"), Axis(title="loss above dense, nats (WikiText-2)")
    found = re.search(r'<svg class="chart wide".*?</svg>', line_chart("front", series, *axes), flags=re.S)
    if found is None:
        raise ValueError("nothing to draw")
    dense = ", ".join(f"{name} {loss:.4f}" for name, loss in data["dense"].items())
    note = f"Dense: {dense} nats per token, {data['tokens']:,} tokens each. {machine_line(data)}"
    return f"{markdown_table(head, rows)}\n\n{note}", {data["experiment"]: standalone(found[0])}


def recalls(data: Data) -> Block:
    """What share of the best channels' activation each kind finds, by layer, at keep 16 alike in all layers."""
    held = [r for r in data["rows"] if r["keep"] == 16 and r["allocation"] == "uniform" and "+" not in r["kind"]]
    held = [r for r in held if r["kind"] not in ("oracle", "threshold")]
    count = len(held[0]["recall"])
    shown = sorted({0, 1, 2, count // 4, count // 2, 3 * count // 4, count - 2, count - 1})
    head = " | ".join(["predictor", "mean", "worst layer", *(f"layer {n}" for n in shown)])
    rows = []
    for r in held:
        worst = min(range(count), key=lambda n: r["recall"][n])
        cells = [r["kind"], f"{r['mean_recall']:.3f}", f"{r['recall'][worst]:.3f} (layer {worst})"]
        rows.append([*cells, *(f"{r['recall'][n]:.3f}" for n in shown)])
    return f"{markdown_table(head, rows)}\n\nAll layers: `benchmarks/results/upcycle-front.json`.", {}


def llamacpp(data: Data) -> Block:
    """Beside llama.cpp."""
    head = "what decodes | tokens/s | over llama.cpp's f16 | WikiText-2 loss"
    rows = [
        [name, f"{r['tokens_per_second']:.1f}", f"{r['over_f16']:.2f}×", f"{r['loss']:.3f}"]
        for name, r in data["rows"].items()
    ]
    return f"{markdown_table(head, rows)}\n\n{data['tokens']:,} tokens for the loss. {machine_line(data)}", {}


def cpt(data: Data) -> Block:
    """What training wins back."""
    runs = {r["arm"]: r for r in data["runs"]}
    head = "arm | steps of tokens | recall | WikiText-2 dense, sparse, gap | PostgreSQL manual | technical English"
    rows = []
    for name, r in runs.items():
        length = next((end for end in ("-short", "-long") if name.endswith(end)), "")
        companion = runs.get(f"dense{length}")
        plan = r.get("schedule") or data["recipe"]
        recall = f"{statistics.fmean(r['looks'][-1]['recall']):.3f}" if r["looks"] else "–"
        tokens = plan["seq_len"] * plan["batch_size"] * plan["accumulate"]
        cells = [name, f"{r['totals']['steps']:,} × {tokens:,}", recall]
        for text, losses in r["losses"].items():
            sparse = losses.get("sparse")
            base = companion["losses"][text]["dense"] if companion else None
            gap = f", **{sparse - base:+.3f}**" if sparse is not None and base is not None else ""
            cells.append(f"{losses['dense']:.3f}" + (f", {sparse:.3f}{gap}" if sparse is not None else ""))
        rows.append(cells)
    note = "Gap: sparse, less the dense companion at equal tokens, nats."
    return f"{markdown_table(head, rows)}\n\n{note}", {}


def curves(data: Data, ending: str = "") -> Block:
    """Held-out loss through training, of the arms of full length, or of those whose names end so."""
    held = {r["arm"]: r["curve"] for r in data["runs"]} | data["unfinished"]
    others = tuple({"-short", "-long"} - {ending})
    held = {
        arm: {p["step"]: p for p in curve}
        for arm, curve in held.items()
        if arm.endswith(ending) and not arm.endswith(others)
    }
    steps = sorted({step for curve in held.values() for step in curve})
    head = " | ".join(["arm", *(f"step {step}" for step in steps)])
    rows = []
    for arm, curve in held.items():
        cells = [
            [f"{curve[s][k]:.3f}" for k in ("loss", "sparse_loss") if k in curve[s]] if s in curve else ["–"]
            for s in steps
        ]
        rows.append([arm, *(", ".join(c) for c in cells)])
    return f"{markdown_table(head, rows)}\n\nDense, and sparse where the arm is; a dash: not trained so far.", {}


def ruler(data: Data, prompts: Data, companion: Data) -> Block:
    """RULER: the upcycled run, all of it sparse or its answers only, and its dense companion on the same documents."""
    head = "length | dense companion | sparse | difference [95 %] | sparse after a dense prompt | difference [95 %]"
    dense, forms = ruler_scores(companion, "dense"), [ruler_scores(d, "sparse") for d in (data, prompts)]
    if any(list(dense.cells) != list(form.cells) for form in forms):
        raise ValueError("the RULER files are of other tasks or lengths")
    rows = []
    for length in [*dense.lengths, None]:
        cells = [f"{100 * (dense.all() if length is None else dense.at(length)).mean:.1f}"]
        for form in forms:
            gap = difference(form, dense, length=length)
            cells.append(f"{100 * (form.all() if length is None else form.at(length)).mean:.1f}")
            cells.append(f"**{100 * gap.mean:+.1f}** [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]")
        rows.append([str(length or "mean"), *cells])
    by_task = []
    for task in dense.tasks:
        own = [[100 * statistics.fmean(s.cells[c]) for c in s.cells if c[0] == task] for s in (dense, *forms)]
        by_task.append(f"{task.removeprefix('ruler_')} {', '.join(f'{statistics.fmean(v):.1f}' for v in own)}")
    count = len(next(iter(dense.cells.values())))
    note = f"In points of 100; {count} documents of each task and length. By task, in this order: {'; '.join(by_task)}."
    return f"{markdown_table(head, rows)}\n\n{note} {machine_line(data)}", {}


def ruler_scores(data: Data, mode: Mode) -> Scores:
    """One mode's, as `fallow evaluate --json` wrote them."""
    cells = data["ruler"][mode]["cells"]
    return Scores(mode=mode, cells={(c["task"], c["length"]): c["scores"] for c in cells})


def repair(*runs: Data) -> Block:
    """Planted faults, found and mended."""
    head = (
        "predictor | fault in layer | first by restoring, by mirroring | nats of answers: healthy, faulty, repaired |"
        " of the loss back | accepted | texts, repaired less healthy"
    )
    rows = []
    for r in runs:
        sweep = r["diagnosis"]["sweep"]
        order = [str(sweep[kind]["order"][0]) if sweep else "–" for kind in ("restore", "mirror")]
        states = [r[state]["nats"] for state in ("healthy", "faulty", "repaired") if state in r]
        texts = (
            [r["repaired"]["texts"][t] - loss for t, loss in r["healthy"]["texts"].items()] if "repaired" in r else []
        )
        back = (r.get("recovered") or {}).get("nats")
        rows.append(
            [
                f"{r['predictor']} {r['rank'] or ''}".strip(), str(r["planted"]), ", ".join(order),
                ", ".join(f"{n:.3f}" for n in states), "–" if back is None else f"**{back:.0%}**",
                (r.get("repair") or {}).get("accepted") or "none",
                ", ".join(f"{t:+.4f}" for t in texts),
            ]
        )  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine_line(runs[0])}", {}


TABLES = [
    ("ffn", ("upcycle-bench",), ffn),
    ("batches", ("upcycle-bench",), batches),
    ("ffn-no-amx", ("upcycle-bench-no-amx",), ffn),
    ("batches-no-amx", ("upcycle-bench-no-amx",), batches),
    ("decode", ("upcycle-bench",), decode),
    ("decode-no-amx", ("upcycle-bench-no-amx",), decode),
    ("gpu-ffn", ("gpu/upcycle-nvidia-h200",), gpu.ffn),
    ("gpu-batches", ("gpu/upcycle-nvidia-h200",), gpu.batches),
    ("gpu-decode", ("gpu/upcycle-nvidia-h200",), gpu.decode),
    ("front", ("upcycle-front",), front),
    ("recalls", ("upcycle-front",), recalls),
    ("llamacpp", ("upcycle-llamacpp",), llamacpp),
    ("cpt", ("upcycle-cpt",), cpt),
    ("curves", ("upcycle-cpt",), curves),
    ("cpt-gpu", ("gpu/upcycle-cpt",), cpt),
    ("curves-gpu", ("gpu/upcycle-cpt",), curves),
    ("curves-long", ("gpu/upcycle-cpt",), partial(curves, ending="-long")),
    ("front-trained", ("upcycle-front-trained",), front),
    ("front-compensated", ("upcycle-front-compensated",), front),
    ("ruler", ("upcycle-ruler", "upcycle-ruler-prompts", "upcycle-ruler-companion"), ruler),
    ("ruler-both", ("upcycle-ruler-both", "upcycle-ruler-both-prompts", "upcycle-ruler-companion"), ruler),
    ("repair", REPAIRS, repair),
]

if __name__ == "__main__":
    raise SystemExit(main(make, "upcycle.md", __doc__))
