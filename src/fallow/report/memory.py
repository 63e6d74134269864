"""The section on memory: what each arm's model state weighs, by kind, and what was predicted, measured and saved.

Peak memory alone would be the obvious figure, but on a small model the process outweighs what sparsity changes. So the
bytes of the tensors stand first, dense beside sparse on one scale, and the measured peak beneath them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fallow.report import bars, wording
from fallow.report.analysis import Arm, Comparison
from fallow.report.figures import Figure
from fallow.report.loading import lookup, number
from fallow.report.view import NONE, Cell, Facts, Row

KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "optimizer moments",
    "masters": "fp32 masters",
    "clocks": "clocks",
    "topology": "topology",
}
"""Kinds whose colour the style sheet knows, and what the page calls them; others are shown under their own name."""
REST = "embeddings, head, norms"


def memory_figure(comparison: Comparison) -> Figure | None:
    """Bytes of model state of each arm, stacked by kind; None when no run has them."""
    held = [(arm, state) for arm in comparison.arms if (state := _state(arm)) is not None]
    if not held:
        return None
    rows = []
    for arm, state in held:
        parts = [(_name(kind), _bytes(state, "layers", kind)) for kind in _kinds(held)]
        parts.append((REST, _bytes(state, "rest")))
        whole = sum(value for _, value in parts)
        share = _share(whole, comparison, arm)
        rows.append((arm.label, parts, wording.size(whole) + (f" · {share}" if share else "")))
    swatches = {_name(kind): f"m-{kind if kind in KINDS else 'other'}" for kind in _kinds(held)} | {REST: "m-rest"}
    body = bars.stacked_bars(rows, amount=wording.size, swatches=swatches, inside=lambda value, _: wording.size(value))
    caption = (
        "Bytes held for the model in an optimizer step, gradients included, counted from its tensors. First the linear "
        "layers by kind, then embeddings, head and norms with all of theirs. Activations and the process itself are "
        "not in it."
    )
    return Figure(key="model-state", title="Model state", body=body, caption=caption)


def memory_table(comparison: Comparison) -> Facts | None:
    """The same in figures, with predictions, ratios, the measured peak and files; None when no run has them."""
    held = [(arm, state) for arm in comparison.arms if (state := _state(arm)) is not None]
    if not held:
        return None
    table = Facts(title="Memory", columns=[arm.label for arm, _ in held])

    def add(name: str, cell: Callable[[Arm, dict[str, Any]], Cell], *, css: str = "") -> None:
        cells = [cell(arm, state) for arm, state in held]
        if any(c.value != NONE for c in cells):
            table.rows.append(Row(name=name, cells=cells, css=css))

    add("Model state", lambda arm, s: _total(arm, s, comparison), css="sum")
    add("Linear layers", lambda _, s: _counted(sum(_layers(s).values()), _predicted(s)), css="in1")
    add("share of dense AdamW’s bytes", lambda _, s: _percent(number(s, "ratio")), css="in2")
    for kind in _kinds(held):
        add(
            _name(kind),
            lambda _, s, kind=kind: _counted(_bytes(s, "layers", kind), number(s, "predicted", kind)),
            css="in2",
        )
    add("Embeddings, head and norms, with all of theirs", lambda _, s: _size(number(s, "rest")), css="in1")
    add("Shared dense buffers beside it", lambda _, s: _size(number(s, "scratch") or None))
    add("Peak memory of the process, measured", lambda arm, _: _peak(arm), css="sum")
    add("Newest checkpoint on disk", lambda _, s: _size(number(s, "files", "checkpoint")), css="sum")
    add("weights", lambda _, s: _size(number(s, "files", "checkpoint_weights")), css="in1")
    add("optimizer state", lambda _, s: _size(number(s, "files", "checkpoint_optimizer")), css="in1")
    add("Trained model on disk, in dense form", lambda _, s: _size(number(s, "files", "model")), css="sum")
    return table


def _state(arm: Arm) -> dict[str, Any] | None:
    """The first repeat's block that holds bytes: seeds do not change them."""
    blocks = (lookup(run.info, "memory") for run in arm.runs)
    return next((b for b in blocks if isinstance(b, dict) and sum(_layers(b).values()) > 0), None)


def _layers(state: dict[str, Any]) -> dict[str, float]:
    layers = state.get("layers")
    return {kind: _bytes(state, "layers", kind) for kind in layers} if isinstance(layers, dict) else {}


def _kinds(held: list[tuple[Arm, dict[str, Any]]]) -> list[str]:
    """Kinds that weigh anything in any arm, known ones first."""
    found = {kind for _, state in held for kind, value in _layers(state).items() if value > 0}
    return [kind for kind in KINDS if kind in found] + sorted(found - set(KINDS))


def _name(kind: str) -> str:
    return KINDS.get(kind, kind)


def _bytes(state: dict[str, Any], *keys: str) -> float:
    return max(number(state, *keys) or 0.0, 0.0)


def _predicted(state: dict[str, Any]) -> float | None:
    parts = state.get("predicted")
    return sum(_bytes(state, "predicted", kind) for kind in parts) if isinstance(parts, dict) else None


def _share(whole: float, comparison: Comparison, arm: Arm) -> str:
    base = comparison.baseline.state_bytes if comparison.baseline is not None else None
    return f"{whole / base.mean:.0%}" if base and arm is not comparison.baseline else ""


def _size(value: float | None) -> Cell:
    return Cell(value=NONE if value is None else wording.size(value))


def _percent(value: float | None) -> Cell:
    return Cell(value=NONE if value is None else f"{value:.1%}")


def _counted(value: float, predicted: float | None) -> Cell:
    cell = Cell(value=wording.size(value) if value else NONE)
    if predicted is not None and (value or predicted):
        cell.note = "as predicted" if value == predicted else f"predicted {wording.size(predicted)}"
    return cell


def _total(arm: Arm, state: dict[str, Any], comparison: Comparison) -> Cell:
    whole = sum(_layers(state).values()) + _bytes(state, "rest")
    share = _share(whole, comparison, arm)
    base = comparison.baseline.label if comparison.baseline else ""
    return Cell(value=wording.size(whole), note=f"{share} of {base}" if share else "")


def _peak(arm: Arm) -> Cell:
    return Cell(value=NONE if arm.peak_memory_mb is None else wording.memory(arm.peak_memory_mb.mean))
