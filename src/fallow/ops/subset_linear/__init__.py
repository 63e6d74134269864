"""`subset_linear`: a linear layer of which only some output rows, or only some input columns, are computed.

    y = x W[rows]ᵀ + b[rows]        x is [.., I], y is [.., K]      (query, key and value projections of kept heads)
    y = x W[:, cols]ᵀ + b           x is [.., K], y is [.., O]      (output projection of kept heads)

FLOPs fall with the number kept; the gradients of the rows or columns left out are exactly zero. SAT (arXiv 2406.01392)
omits attention heads so; the block index and the gather in the weight's memory order are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.errors import BackendError, ConfigError
from fallow.ops.subset_linear import cpu, naive

BACKENDS = [cpu, naive]
last_used = "none yet"


def subset_linear(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    *,
    block: int = 1,
    backend: str | None = None,
) -> Tensor:
    """`F.linear` with a subset of the rows, or of the columns, of `weight_OI`.

    Args:
        x: [..., I] with `rows`; [..., K·block] with `cols`: what belongs to the kept columns, in their order.
            Floating. Under autocast it is cast to the autocast dtype.
        weight_OI: [O, I], contiguous or transposed; cast to the dtype of `x` slice by slice where they differ.
        bias_O: [O] or None. With `rows` only the kept entries are added.
        rows, cols: int64 [K], distinct, on the weight's device; at most one of them. Both None keeps everything.
        block: the index counts blocks of this many consecutive rows or columns; 1 counts single ones.
        backend: "naive" or "cpu" (which runs on any device); None takes the first that can run.

    Returns:
        [..., K·block] with `rows`, else [..., O]; dtype of `x` (of autocast under autocast).

    Raises:
        ConfigError: both `rows` and `cols`, or a `block` that does not divide the indexed dimension.
        BackendError: the backend asked for is unknown or cannot run here.
    """
    global last_used
    if rows is not None and cols is not None:
        raise ConfigError("subset_linear: give rows or cols, not both; call it twice to restrict both sides")
    size = weight_OI.shape[0 if cols is None else 1]
    if block < 1 or size % block:
        raise ConfigError(f"subset_linear: block={block} does not divide the {size} rows or columns it counts")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    module = _choose(x, backend)
    last_used = module.name
    return module.subset_linear(x, weight_OI, bias_O, rows, cols, block=block)


def _choose(x: Tensor, backend: str | None):
    if backend is None:
        return next(b for b in BACKENDS if b.available()[0] and b.usable(x)[0])
    named = {b.name: b for b in BACKENDS}
    if backend not in named:
        raise BackendError(f"subset_linear has no backend {backend!r}; it has {', '.join(named)}")
    for ok, reason in (named[backend].available(), named[backend].usable(x)):
        if not ok:
            raise BackendError(f"subset_linear: backend {backend!r} cannot run: {reason}; use backend='naive'")
    return named[backend]
