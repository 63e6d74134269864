"""The held-out loss: token-weighted mean of nats per predicted token, every neuron computed.

The Trainer's own evaluation loop averages batch means, draws from the random state through its DataLoader, and would
run a method in whichever mode it is; here rows are taken evenly spaced, in order, in dense mode, and no random number
is drawn, so that evaluating more or less often never changes a run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from fallow.errors import DataError
from fallow.method import Method, Mode
from fallow.training.packing import IGNORED


def loss(
    model: PreTrainedModel,
    rows: Dataset,
    *,
    tokens: int,
    batch_size: int,
    sparsity: Method | None = None,
    mode: Mode = "dense",
    stopped: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean cross-entropy in nats over about `tokens` held-out tokens.

    Args:
        model: evaluated as it stands; training or evaluation mode and the method's mode are restored.
        rows: packed rows (columns input_ids, position_ids, labels, each [T] int64).
        tokens: how many, rounded to whole rows, taken evenly spaced from all of them.
        batch_size: rows per forward pass.
        sparsity: the method on the model, if any.
        mode: what it computes meanwhile.
        stopped: asked before each batch; True ends the evaluation.

    Returns:
        The loss, or None when it was stopped.

    Raises:
        DataError: no token of these rows bears loss.
    """
    seq_len = len(rows[0]["input_ids"])
    count = min(len(rows), max(1, tokens // seq_len))
    chosen = [i * len(rows) // count for i in range(count)]
    was_training = model.training
    total, predicted = 0.0, 0
    model.eval()
    try:
        with torch.no_grad(), sparsity.in_mode(mode) if sparsity else nullcontext():
            for start in range(0, count, batch_size):
                if stopped():
                    return None
                batch = {k: v.to(model.device) for k, v in rows[chosen[start : start + batch_size]].items()}
                number = int((batch["labels"][:, 1:] != IGNORED).sum())
                if number:
                    total += float(model(**batch, use_cache=False).loss) * number
                    predicted += number
    finally:
        model.train(was_training)
    if not predicted:
        raise DataError("no held-out token bears loss; name more eval_data or raise seq_len")
    return total / predicted
