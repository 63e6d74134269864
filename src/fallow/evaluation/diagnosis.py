"""Finds the layer that breaks long context, in five steps whose last two, repair and acceptance, are other files.

1. The gap per task and length: nats per answer token that the sparse mode costs over the dense mode of the same
   weights, with intervals widened for the number of cells (Bonferroni). Only cells with an interval above zero go on.
2. Two sweeps over layers on those cells (`sweeps`): a dense layer in a sparse model, a sparse layer in a dense one.
   A failure is layer-local when one layer leads both by far, in nearly all bootstrap draws of the documents.
3. Its cause (`causes`). The result is JSON; nothing in the model is changed.

Source: "Diagnose → repair" of our specification; arXiv 2606.10722 found such a failure in one layer and a band of
lengths. CWE gets harder with length by construction, so every length is compared with dense, never with others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fallow import machine
from fallow.errors import ConfigError
from fallow.evaluation import bootstrap, ruler
from fallow.evaluation.answers import Answer, answer_nats, tokenized
from fallow.evaluation.causes import causes
from fallow.evaluation.documents import SEEDED, TASKS, make_all
from fallow.evaluation.subject import Subject
from fallow.evaluation.sweeps import Ranking, Say, Swept, ranking, sweep, upcycled
from fallow.method import Mode

CERTAIN = 0.95
"""Share of bootstrap draws in which a layer must lead."""
LEAD = 2.0
"""Times the runner-up's nats that the leading layer must have, in both sweeps."""
ALPHA = 0.05
"""Chance that any cell is called significant without being so."""


@dataclass(kw_only=True, slots=True)
class Asked:
    """How to look."""

    tasks: tuple[str, ...] = (SEEDED, *TASKS[1:])
    """RULER tasks; common words with a seed per document, so that answers lie everywhere."""
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens of the documents."""
    documents: int = 8
    """Per task and length."""
    sweep: int = 12
    """Documents that the sweeps use, over all cells, those with the widest gap first."""
    seed: int = 0
    """Of the documents; repairs are judged on others."""

    def __post_init__(self) -> None:
        if not self.tasks or not self.lengths:
            raise ConfigError("diagnose: name at least one of --tasks and one of --lengths")
        if self.documents < 4:
            raise ConfigError(f"diagnose: --documents {self.documents}: an interval needs at least 4")
        if self.sweep < 4:
            raise ConfigError(f"diagnose: --sweep {self.sweep}: a ranking needs at least 4 documents")


def diagnose(subject: Subject, asked: Asked, *, say: Say = lambda _: None) -> dict[str, Any]:
    """Steps 1 to 3 on RULER's documents.

    Raises:
        ConfigError: the subject has no predictors, a length is beyond its context or too short, or lm-eval is missing.
    """
    upcycled(subject, "diagnose")
    ruler.check(subject, asked.tasks, asked.lengths)
    documents = make_all(
        asked.tasks, asked.lengths, count=asked.documents, seed=asked.seed, tokenizer=subject.tokenizer
    )
    answers = tokenized(documents, subject.tokenizer)
    how = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(asked).items()}
    return diagnose_answers(subject, answers, most=asked.sweep, say=say) | {"asked": how}


def diagnose_answers(
    subject: Subject, answers: Sequence[Answer], *, most: int, say: Say = lambda _: None
) -> dict[str, Any]:
    """The same on any prompts with answers."""
    began = time.monotonic()
    handle = upcycled(subject, "diagnose")
    dense, sparse = (nats_of(subject, answers, mode=mode, say=say) for mode in ("dense", "sparse"))
    gaps = cell_gaps(answers, dense, sparse)
    sick = {(g["task"], g["length"]) for g in gaps if g["significant"]}
    result: dict[str, Any] = {
        "kind": "diagnosis",
        "model": subject.about,
        "layers": len(handle.layers),
        "keep": [layer.keep for layer in handle.layers],
        "bank": handle.config.bank,
        "predictor": handle.config.predictor,
        "gaps": gaps,
        "lengths": length_gaps(answers, dense, sparse),
        "significant": [list(cell) for cell in sorted(sick)],
        "sweep": None,
        "causes": None,
    }
    if sick:
        gap = np.array(sparse) - np.array(dense)
        chosen = _chosen(answers, gap, sick, most)
        some = [answers[n] for n in chosen]
        swept = sweep(subject, some, say=say)
        result["sweep"] = _sweep_as_dict(some, swept)
        result["causes"] = causes(subject, some, result["sweep"]["layer"], say=say)
    result["verdict"] = verdict(result)
    return result | {"seconds": time.monotonic() - began, "machine": machine.describe()}


def nats_of(
    subject: Subject,
    answers: Sequence[Answer],
    *,
    mode: Mode,
    dense_layer: int | None = None,
    say: Say = lambda _: None,
) -> list[float]:
    """Mean nats per answer token of each document; with one layer dense all the same, where asked."""
    with subject.evaluated(mode) as model:
        if dense_layer is not None:
            upcycled(subject, "diagnose").layers[dense_layer].mode = "dense"  # leaving `evaluated` takes it back
        found = [float(answer_nats(model, answer).mean()) for answer in answers]
    say(f"{mode}: {np.mean(found):.4f} nats per answer token over {len(found)} documents")
    return found


def cells(answers: Sequence[Answer]) -> dict[tuple[str, int], list[int]]:
    """(task, length) -> which documents."""
    found: dict[tuple[str, int], list[int]] = {}
    for n, answer in enumerate(answers):
        found.setdefault((answer.task, answer.length), []).append(n)
    return found


def cell_gaps(answers: Sequence[Answer], dense: Sequence[float], sparse: Sequence[float]) -> list[dict[str, Any]]:
    """Step 1: per task and length."""
    held = cells(answers)
    level = 1 - ALPHA / len(held)
    found = []
    for (task, length), rows in held.items():
        gap = bootstrap.difference([sparse[n] for n in rows], [dense[n] for n in rows], level=level)
        found.append(
            {
                "task": task,
                "length": length,
                "dense": float(np.mean([dense[n] for n in rows])),
                "sparse": float(np.mean([sparse[n] for n in rows])),
                "gap": gap.as_dict(),
                "significant": gap.above_zero,
            }
        )
    return found


def length_gaps(answers: Sequence[Answer], dense: Sequence[float], sparse: Sequence[float]) -> list[dict[str, Any]]:
    """The gap per length, tasks weighed alike."""
    found = []
    for length in sorted({answer.length for answer in answers}):
        groups = [[sparse[n] - dense[n] for n in rows] for (_, at), rows in cells(answers).items() if at == length]
        gap = ruler.stratified(groups)
        found.append({"length": length, "gap": gap.as_dict(), "significant": gap.above_zero})
    return found


def _chosen(answers: Sequence[Answer], gap: np.ndarray, sick: set[tuple[str, int]], most: int) -> list[int]:
    """Documents for the sweeps: from the significant cells in turn, the cells with the widest gap first."""
    held = {cell: rows for cell, rows in cells(answers).items() if cell in sick}
    order = sorted(held, key=lambda cell: -float(gap[held[cell]].mean()))
    longest = max(map(len, held.values()))
    turns = [held[cell][turn] for turn in range(longest) for cell in order if turn < len(held[cell])]
    return sorted(turns[:most])


def _sweep_as_dict(answers: Sequence[Answer], swept: Swept) -> dict[str, Any]:
    """Rankings of both sweeps, what they say together, and both by length, as shares of the length's gap."""
    restore, mirror = ranking(swept.recovery_NL), ranking(swept.damage_NL)
    gap = float((swept.sparse_N - swept.dense_N).mean())
    layer = restore.order[0]
    local = restore.order[0] == mirror.order[0] and _leads(restore) and _leads(mirror)
    by_length = {}
    for length in sorted({answer.length for answer in answers}):
        part = swept.of([n for n, answer in enumerate(answers) if answer.length == length])
        whole = float((part.sparse_N - part.dense_N).mean())
        by_length[str(length)] = {
            "gap": whole,
            "restore": [float(v) for v in part.recovery_NL.mean(0)],
            "mirror": [float(v) for v in part.damage_NL.mean(0)],
        }
    return {
        "documents": len(answers),
        "gap": gap,
        "layer": layer,
        "local": bool(local),
        "share": restore.means[layer] / gap if gap > 0 else 0.0,
        "restore": restore.as_dict(),
        "mirror": mirror.as_dict(),
        "by_length": by_length,
    }


def _leads(held: Ranking) -> bool:
    """Whether the first layer is that in nearly all draws, and by far."""
    first, second = held.means[held.order[0]], held.means[held.order[min(1, len(held.order) - 1)]]
    return held.certainty >= CERTAIN and held.leader.above_zero and first >= LEAD * second


def verdict(result: dict[str, Any]) -> str:
    """One or two sentences on what was found."""
    if not result["significant"]:
        return "No task and length has a gap whose interval is above zero: there is nothing to repair."
    held, why = result["sweep"], result["causes"]
    restore, mirror = held["restore"], held["mirror"]
    lengths = ", ".join(str(v) for v in sorted({length for _, length in result["significant"]}))
    if held["local"]:
        return (
            f"Layer {held['layer']} fails (at {lengths} tokens): dense, it alone brings back {held['share']:.0%} of the"
            f" gap of {held['gap']:.3f} nats, and sparse alone it costs most. Cause: {why['cause']}; {why['why']}."
        )
    second = f"layer {mirror['leader']} leads" if mirror["leader"] != restore["leader"] else "the same layer leads"
    return (
        f"The gap of {held['gap']:.3f} nats (at {lengths} tokens) is not one layer's: layer {restore['leader']} brings"
        f" back most, {held['share']:.0%}, in {restore['certainty']:.0%} of draws; in the mirror {second}, in"
        f" {mirror['certainty']:.0%}."
    )


__all__ = ["Asked", "Ranking", "cell_gaps", "diagnose", "diagnose_answers", "nats_of", "verdict"]
