"""Causal-LM cross entropy that never makes an fp32 copy of the logits; set as `model.loss_function` on a transformers
model.

transformers' own loss casts all logits to fp32 first: at 2048 tokens × 49k words 400 MB for the copy, as much again for
its softmax and its gradient. Registered as `fallow::cross_entropy`, so that `torch.compile` keeps it whole.
Cost: bound by memory bandwidth, three passes over the logits in their own dtype.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fallow.errors import ConfigError
from fallow.ops.cross_entropy import cpu, naive

BACKENDS = [cpu, naive]
last_used = "none"

__all__ = ["BACKENDS", "causal_lm_loss", "cross_entropy", "last_used"]


def _backend(logits_NV: Tensor) -> ModuleType:
    global last_used
    chosen = cpu if cpu.available()[0] and cpu.usable(logits_NV)[0] else naive
    last_used = chosen.name
    return chosen


@torch.library.custom_op("fallow::cross_entropy", mutates_args=())
def _forward(logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    lse_N, loss_N = _backend(logits_NV).forward(logits_NV, labels_N, ignore_index)
    return loss_N.sum(), lse_N


@_forward.register_fake
def _(logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    lse_N = logits_NV.new_empty((logits_NV.shape[0],), dtype=torch.float32)
    return lse_N.new_empty(()), lse_N


@torch.library.custom_op("fallow::cross_entropy_backward", mutates_args=())
def _backward(scale: Tensor, logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, ignore_index: int) -> Tensor:
    return _backend(logits_NV).backward(logits_NV, labels_N, lse_N, scale, ignore_index)


@_backward.register_fake
def _(scale: Tensor, logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, ignore_index: int) -> Tensor:
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_NV, labels_N, ctx.ignore_index = inputs
    ctx.save_for_backward(logits_NV, labels_N, output[1])


def _gradient(ctx: Any, grad_loss: Tensor, _grad_lse: Tensor) -> tuple[Tensor, None, None]:
    logits_NV, labels_N, lse_N = ctx.saved_tensors
    return _backward(grad_loss, logits_NV, labels_N, lse_N, ctx.ignore_index), None, None


_forward.register_autograd(_gradient, setup_context=_save)


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Sum of the cross entropies of N rows, an fp32 scalar in nats; `F.cross_entropy(logits.float(), labels,
    reduction="sum")`.

    Args:
        logits_NV: [N, V], any floating dtype; the gradient comes in the same dtype.
        labels_N: int64 [N], in [0, V) or `ignore_index`.
        ignore_index: rows with this label add nothing, get zero gradient and are skipped.

    Raises:
        ConfigError: shapes do not fit, or a label is outside the vocabulary.
    """
    if logits_NV.ndim != 2 or labels_N.shape != logits_NV.shape[:1]:
        raise ConfigError(f"logits {tuple(logits_NV.shape)} and labels {tuple(labels_N.shape)}; wanted [N, V] and [N]")
    if not torch.compiler.is_compiling() and labels_N.numel():
        # The kernel indexes rows by label: an id outside would read foreign memory. 10 us for 2048 labels.
        low, high = (int(x) for x in torch.aminmax(labels_N))
        vocabulary = logits_NV.shape[1]
        if high >= vocabulary or (low < 0 and bool(((labels_N < 0) & (labels_N != ignore_index)).any())):
            raise ConfigError(
                f"labels between {low} and {high} for a vocabulary of {vocabulary} (ignored: {ignore_index}); "
                "tokenise with this model's tokenizer"
            )
    return _forward(logits_NV, labels_N.long().contiguous(), ignore_index)[0]


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The next-token loss, in the signature of transformers' `ForCausalLMLoss`; set it with `model.loss_function =
    causal_lm_loss`.

    `**kwargs` is here, and only here, because transformers passes every extra argument of `model(...)` on to its loss
    function and expects those of other losses to be ignored.

    Args:
        logits: [B, T, V] (or [N, V]).
        labels: int64 [B, T]; token t is scored against labels[t + 1]. May be None when `shift_labels` is given.
        vocab_size: V.
        num_items_in_batch: divide the summed loss by this (gradient accumulation); None: by the number of scored
            tokens.
        ignore_index: label of tokens that are not scored.
        shift_labels: labels that are shifted already; `labels` is then unused.

    Returns:
        fp32 scalar, nats per token.

    Raises:
        ConfigError: neither labels nor shift_labels, or they do not fit the logits.
    """
    if shift_labels is None:
        if labels is None:
            raise ConfigError("causal_lm_loss needs labels or shift_labels; pass labels=input_ids to the model")
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels_N = shift_labels.reshape(-1).to(logits.device)
    total = cross_entropy(logits.reshape(-1, vocab_size), labels_N, ignore_index=ignore_index)
    if num_items_in_batch is None:
        return total / (labels_N != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
