"""How far an exported model's answers are from the training-time forward, and how far they may be.

Both run in fp32 on the same random tokens: in 16 bits two correct programs disagree about percents of the top tokens
of a random model, because a rounded router chooses other experts, and that would hide percents of wrong folding. A
16-bit export still has a rounded router, so of it no more is asked than that it be as near to the fp32 forward as the
model's own 16-bit forward is. Cost: the model's weights once more, in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from fallow.errors import CheckpointError


class Bounds(NamedTuple):
    """What an export must reach."""

    top1: float
    error: float


MOE_BOUNDS = Bounds(top1=0.995, error=0.01)
GGUF_BOUNDS = Bounds(top1=0.98, error=0.02)


class Agreement(NamedTuple):
    """Two sets of logits compared."""

    top1: float
    """Share of the tokens whose largest logit is the same."""
    error: float
    """Mean |difference| over mean |logit|, the logits of a token taken from their mean."""
    tokens: int

    def words(self) -> str:
        return f"top-1 agreement {self.top1:.2%}, mean logit error {self.error:.2%} over {self.tokens} tokens"


def probe(vocab: int, device: torch.device | str = "cpu") -> Tensor:
    """[8, 64] token ids, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (8, 64), generator=generator).to(device)


@torch.no_grad()
def reference(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """(ids [B, T], logits [B, T, V]) of the model in fp32, in the mode it is in; its own weights stay as they are."""
    ids_BT = probe(model.get_input_embeddings().weight.shape[0], model.device)  # type: ignore[union-attr]
    single: dict[str, Tensor] = {
        name: x.float() if x.is_floating_point() else x
        for name, x in (*model.named_parameters(), *model.named_buffers())
    }
    answer: Any = functional_call(model, single, kwargs={"input_ids": ids_BT, "use_cache": False})
    return ids_BT, answer.logits.float()


@torch.no_grad()
def bounds_of(model: PreTrainedModel, ids_BT: Tensor, wanted_BTV: Tensor, bounds: Bounds) -> tuple[Bounds, list[str]]:
    """`bounds`, widened for a 16-bit model to what its own arithmetic loses against `wanted_BTV`, and that in words."""
    if model.dtype not in (torch.bfloat16, torch.float16):
        return bounds, []
    answer: Any = model(input_ids=ids_BT, use_cache=False)
    own = agreement(wanted_BTV, answer.logits.float())
    dtype = str(model.dtype).removeprefix("torch.")
    said = f"for comparison, the training-time forward in {dtype} against itself in float32: {own.words()}"
    return Bounds(min(bounds.top1, own.top1), max(bounds.error, own.error)), [said]


def agreement(wanted_BTV: Tensor, found_BTV: Tensor) -> Agreement:
    """Compare logits [..., V]."""
    wanted, found = wanted_BTV.flatten(0, -2), found_BTV.to(wanted_BTV).flatten(0, -2)
    wanted, found = (x - x.mean(-1, keepdim=True) for x in (wanted, found))
    same = (wanted.argmax(-1) == found.argmax(-1)).float().mean()
    error = (wanted - found).abs().mean() / wanted.abs().mean().clamp_min(1e-30)
    return Agreement(float(same), float(error), len(wanted))


def require(reached: Agreement, what: str, bounds: Bounds) -> str:
    """Words for `Exported.verified`, or CheckpointError where the agreement is not reached."""
    if not (reached.top1 >= bounds.top1 and reached.error <= bounds.error):
        raise CheckpointError(
            f"export: {what} does not answer as the training-time forward: {reached.words()}, wanted at least"
            f" {bounds.top1:.1%} and at most {bounds.error:.0%}; nothing was written"
        )
    return f"{what} against the training-time forward: {reached.words()}"
