"""Upcycle's tables that come from a GPU, for upcycle_figures.py: one FFN, several tokens, whole decoding."""

from __future__ import annotations

from typing import Any

from results_page import markdown_table

Data = dict[str, Any]
Block = tuple[str, dict[str, str]]


def ffn(data: Data) -> Block:
    """One FFN and one token: µs of the fastest dense form and of every predictor."""
    head = "predictor | dense, compiled µs | dense, fastest µs | sparse µs | of it choosing | ratio | ideal by bytes"
    rows = []
    for r in (r for r in data["rows"] if r.get("tokens") == 1):
        compiled = r["dense_forms_ms"].get("dense/compiled")
        rows.append(
            [
                r["predictor"], "–" if compiled is None else f"{1e3 * compiled:.1f}",
                f"{1e3 * r['dense_ms']:.1f} ({r['dense_form'].removeprefix('dense/')})", f"{1e3 * r['sparse_ms']:.1f}",
                f"{1e3 * r['choose_ms']:.1f}", f"**{r['ratio']:.2f}×**", f"{r['ideal']:.2f}×",
            ]
        )  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine(data)}", {}


def batches(data: Data) -> Block:
    """The ratios of several tokens that choose for themselves, and where they pass 1."""
    held = [r for r in data["rows"] if "tokens" in r]
    sizes = sorted({r["tokens"] for r in held})
    rows = []
    for kind in dict.fromkeys(r["predictor"] for r in held):
        mine = {r["tokens"]: r["ratio"] for r in held if r["predictor"] == kind}
        if len(mine) > 1:
            at = data.get("break_even", {}).get(f"{held[0]['case']}/{kind}")
            cells = [f"{mine[n]:.2f}×" if n in mine else "–" for n in sizes]
            rows.append([kind, *cells, "none" if at is None else f"{at:.1f}"])
    head = " | ".join(["predictor", *(f"{n} tokens" if n > 1 else "1 token" for n in sizes), "pays up to"])
    return markdown_table(head, rows), {}


def decode(data: Data) -> Block:
    """Whole decoding, one text."""
    head = "model | predictor | fastest dense ms a token | sparse ms a token | ratio | ideal by bytes"
    rows = [
        [
            r["case"], r["predictor"], f"{r['dense_ms']:.2f} ({r['dense_form'].removeprefix('dense/')})",
            f"{r['sparse_ms']:.2f} ({r['sparse_form'].removeprefix('sparse/')})", f"**{r['ratio']:.2f}×**",
            f"{r['ideal']:.2f}×",
        ]
        for r in data["rows"] if r["case"].startswith("decode")
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{machine(data)}", {}


def machine(data: Data) -> str:
    versions = data["versions"]
    names = ", ".join(dict.fromkeys(data["machine"]["gpus"]))
    return f"Machine: {names}, torch {versions['torch']}, Triton {versions.get('triton', 'of that release')}."
