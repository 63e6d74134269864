"""Tables and figures of docs/results/smet.md, made from the JSON files of benchmarks/results and nothing else.

    python benchmarks/smet_figures.py

Writes docs/results/figures/smet-*.svg, and replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`;
prose outside of the markers is left alone. Where a JSON file is missing, the block says which command makes it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results_page import fill_page, machine_line, main, markdown_table
from smet_arms import ABLATIONS, MAIN
from smet_charts import density_chart, spike_chart
from smet_collate import Summary, at_equal_seconds, summarise

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "smet-bench": "fallow bench smet --json > benchmarks/results/smet-bench.json",
    "smet-bench-no-amx": "fallow bench smet --json > benchmarks/results/smet-bench-no-amx.json on a CPU without AMX",
    "smet-memory": "python benchmarks/smet_memory.py",
    "smet-pace": "python benchmarks/smet_pace.py",
    "smet-spike": "python benchmarks/smet_spike.py --density 0.25",
    "smet-pretrain": "python benchmarks/smet_experiments.py main ablations --seeds 0 1, then … collate",
}
Data = dict[str, Any]


def make(results: Path, page: Path) -> list[str]:
    """Write all figures beside `page` and fill its tables. Returns one line per table."""
    return fill_page(results, page, TABLES, COMMANDS)


def bench(data: Data) -> tuple[str, dict[str, str]]:
    """Whole steps of `fallow bench smet --json`."""
    head = (
        "case | form | dtype | density | tokens | fastest dense ms | SMET ms | ratio | ideal | of ideal | same dtype"
        " | step time, same dtype | state bytes | update | dense form | SMET form"
    )
    rows = [
        [
            r["case"], r["form"], r["dtype"], f"{r['density']:g}", f"{r['tokens']:,}", f"{r['dense_ms']:,.0f}",
            f"{r['sparse_ms']:,.0f}", f"**{r['ratio']:.2f}×**", f"{r['ideal']:.2f}×", f"{r['efficiency']:.0%}",
            f"{r['ratio_same_dtype']:.2f}×" if "ratio_same_dtype" in r else "–",
            f"{r['step_time']:.2f}×", f"{r['state_bytes']:.3f}×", f"{r['update_share']:.1%}",
            r["dense_form"].removeprefix("dense/"), r["sparse_form"].removeprefix("sparse/"),
        ]
        for r in data["rows"] if "form" in r
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine_line(data)}", {}


def layers(data: Data) -> tuple[str, dict[str, str]]:
    """One linear layer of tiles, forward and backward."""
    head = "layer | tile | density | tokens | dense ms | tiles ms | ratio | ideal | of ideal | kernel"
    rows = [
        [
            r["case"], str(r["block"]), f"{r['density']:g}", f"{r['tokens']:,}", f"{r['dense_ms']:,.1f}",
            f"{r['sparse_ms']:,.1f}", f"**{r['ratio']:.2f}×**", f"{r['ideal']:.2f}×", f"{r['efficiency']:.0%}",
            r["backend"],
        ]
        for r in data["rows"] if "form" not in r
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine_line(data)}", {}


def memory(data: Data) -> tuple[str, dict[str, str]]:
    """Peaks of processes beside the bytes promised."""
    head = "form | state of the sparse layers | whole state MiB | peak MiB | promised fall | measured fall | kept"
    rows = []
    for r in data["rows"]:
        cells = [r["form"], f"{r.get('state_ratio', 1):.3f}×", f"{r['state_mb']:,.0f}", f"{r['peak_mb']:,.0f}"]
        if "kept" in r:
            fall = (f"{r['promised_fall_mb']:,.0f}", f"{r['measured_fall_mb']:,.0f}", f"**{r['kept']:.1%}**")
        else:
            fall = ("–", "–", "–")
        rows.append([*cells, *fall])
    note = f"{data['layers']} layers of a 1B model's widths, {data['tokens']} tokens, {data['dtype']}."
    return f"{markdown_table(head, rows)}\n\n{note} {machine_line(data)}", {}


def pretrain(data: Data, pace: Data) -> tuple[str, dict[str, str]]:
    """The main table: final loss of every arm, with its bytes and seconds."""
    of = summarise(data)
    steps = {r["arm"]: r["step_time"] for r in pace["rows"]}
    head = (
        "arm | seeds | held-out loss | gap to dense | state MB | of dense | step time | gap at equal seconds"
        " | after updates"
    )
    rows = [
        [
            arm.name, str(len(s.losses)), _ranged(s.losses, ".4f"), _ranged(s.gaps, "+.4f"),
            f"{s.state_bytes / 1e6:.1f}", f"{s.state_bytes / of['dense'].state_bytes:.2f}×",
            f"{steps[arm.name]:.2f}×" if arm.name in steps else "–",
            _ranged(at_equal_seconds(data, arm.name, steps.get(arm.name)), "+.4f"),
            f"{s.rise:+.4f}" if arm.smet and arm.smet["update_every"] else "–",
        ]
        for arm in MAIN if (s := of.get(arm.name))
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{_note(data)}", {"smet-density": density_chart(of)}


def spikes(data: Data) -> tuple[str, dict[str, str]]:
    """What one update does to the loss in the ten steps after it, against the same steps without it."""
    head = "density | learning rate | stops | at once | rise, plain SET | rise, own clock | rise, SMET | SMET of SET"
    rows = [
        [
            f"{r['density']:g}", f"{r['lr_scale']:g} α · d^-{r['lr_exponent']:g}",
            str(r["stops"]), f"{r['at_once']['set']:+.4f}",
            *(f"{r['rise'][n]:+.4f}" for n in ("set", "reset", "smet")), f"**{r['smet_of_set']:.0%}**",
        ]
        for r in sorted(data["rows"], key=lambda r: (-r["density"], r["lr_exponent"], r["lr_scale"]))
    ]  # fmt: skip
    return markdown_table(head, rows), {"smet-spike": spike_chart(data)}


def ablations(data: Data) -> tuple[str, dict[str, str]]:
    """One thing changed at a time, each beside what it changes."""
    of = summarise(data)
    head = "arm | seeds | held-out loss | against | difference"
    rows = []
    for arm in ABLATIONS:
        s = of.get(arm.name)
        if s is None:
            continue
        base = "dense" if arm.smet is None else "-".join(arm.name.split("-")[:2])
        pairs = [loss - of[base].losses[seed] for seed, loss in s.losses.items() if seed in of[base].losses]
        rows.append([arm.name, str(len(s.losses)), _ranged(s.losses, ".4f"), base, _ranged(pairs, "+.4f")])
    return markdown_table(head, rows), {}


def _ranged(values: Any, form: str) -> str:
    numbers = list(values.values()) if isinstance(values, dict) else list(values)
    if not numbers:
        return "–"
    mean = format(statistics.fmean(numbers), form)
    return mean if len(numbers) == 1 else f"{mean} [{min(numbers):{form}} … {max(numbers):{form}}]"


def _note(data: Data) -> str:
    r = data["recipe"]
    machines = ", ".join(sorted({m["cpu"] for m in data["machines"]}))
    return (
        f"{r['steps']} steps of {r['batch_size']}×{r['seq_len']} tokens, fp32, peak learning rate {r['lr']:g} (blocks),"
        f" β {r['betas'][0]}/{r['betas'][1]}; means over seeds [range]. Machine: {machines}, one thread each."
    )


Build = Callable[..., tuple[str, dict[str, str]]]
TABLES: list[tuple[str, tuple[str, ...], Build]] = [
    ("bench", ("smet-bench",), bench),
    ("layers", ("smet-bench",), layers),
    ("bench-no-amx", ("smet-bench-no-amx",), bench),
    ("layers-no-amx", ("smet-bench-no-amx",), layers),
    ("memory", ("smet-memory",), memory),
    ("pretrain", ("smet-pretrain", "smet-pace"), pretrain),
    ("spikes", ("smet-spike",), spikes),
    ("ablations", ("smet-pretrain",), ablations),
]
__all__ = ["Summary", "make"]

if __name__ == "__main__":
    raise SystemExit(main(make, "smet.md", __doc__))
