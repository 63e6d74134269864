"""Documents whose right answers a random model knows, and a fault in one predictor.

The answers are drawn from the dense model itself, so that its likelihood of them is the highest in expectation and
every change of the model lowers it by its divergence; a random model would answer RULER's questions by chance.
"""

from __future__ import annotations

import torch

from fallow.evaluation.answers import Answer
from fallow.evaluation.subject import Subject
from fallow.methods.upcycle.layers import GatedFFN
from tests.evaluation.subjects import subject

ANSWER = 64
KINDS = {
    "linear": {"rank": 31, "act": "relu"},  # of a SwiGLU with random weights no linear map finds the large channels
    "bilinear": {"rank": 28},
    "quantized": {"rank": None},
}


def sound(kind: str) -> Subject:
    """A model of four layers whose predictors of that kind find half of the channels of a bank well."""
    return subject(layers=4, predictor=kind, keep=8, down=1.5, **KINDS[kind])


def answers_of(
    made: Subject, *, count: int, lengths: tuple[int, ...], seed: int = 0, task: str = "drawn"
) -> list[Answer]:
    """`count` random prompts of each length, and 64 tokens that the dense model continued each with."""
    chance = torch.Generator().manual_seed(seed)
    vocab = made.model.config.vocab_size
    found = []
    with made.evaluated("dense") as model:
        for length in lengths:
            ids = torch.randint(2, vocab, (count, length), generator=chance)
            for _ in range(ANSWER):
                logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
                ids = torch.cat([ids, torch.multinomial(logits.softmax(1), 1, generator=chance)], dim=1)
            found += [
                Answer(task=task, length=length, ids=row, wanted=ANSWER, classes=("begin",) * ANSWER) for row in ids
            ]
    return found


def plant(layer: GatedFFN, *, seed: int) -> None:
    """Permute the rows of a predictor, so that it scores every channel as it should another; of a quantized one, which
    has no rows, what it multiplies each channel's score by is spread over some orders of magnitude."""
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(layer.view.n_channels, generator=chance)
    with torch.no_grad():
        rows = [p for n, p in layer.predictor.named_parameters() if n.endswith("_FR")]
        for parameter in rows:
            parameter.copy_(parameter[order])
        if not rows:
            layer.predictor.tilt_F.mul_(torch.exp(3 * torch.randn(len(order), generator=chance)))
    layer.stale()
