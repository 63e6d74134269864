"""Scaled dot-product attention with grouped queries, fast on CPU; `enable(model)` gives it to a transformers model.

It serves dense and sparse runs alike: heads may be fewer than the config says, because only shapes are read.
Registered as `fallow::attention_cpu`, so that `torch.compile` and gradient checkpointing keep it.
"""

from __future__ import annotations

from torch import Tensor

from fallow.errors import ConfigError
from fallow.ops.attention import cpu, naive
from fallow.ops.attention.integration import disable, enable

BACKENDS = [cpu, naive]
last_used = "none"

__all__ = ["BACKENDS", "attention", "disable", "enable", "last_used"]


def attention(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v with the H query heads sharing G key/value heads, consecutive H / G to one.

    Args:
        q_BHTd: queries [B, H, T, d].
        k_BGTd: keys [B, G, T, d], G a divisor of H.
        v_BGTd: values [B, G, T, d].
        scale: multiplies the scores, usually d ** -0.5.
        mask: [B|1, 1, T, T]; bool with True where a key may be seen, or added to the scores. None: nothing is masked.
        causal: queries see no later keys (in addition to `mask`).
        dropout: of the probabilities; above 0 only the naive backend serves.

    Returns:
        [B, H, T, d] in the dtype of q. A query that may see no key gives zeros.

    Raises:
        ConfigError: the heads of q are no multiple of those of k.
    """
    global last_used
    if q_BHTd.shape[1] % k_BGTd.shape[1] or k_BGTd.shape[1] != v_BGTd.shape[1]:
        raise ConfigError(
            f"{q_BHTd.shape[1]} query heads on {k_BGTd.shape[1]} key and {v_BGTd.shape[1]} value heads; "
            "omit whole groups, or as many query heads in each"
        )
    backend = cpu if cpu.usable(q_BHTd, k_BGTd, v_BGTd, mask, dropout)[0] else naive
    last_used = backend.name
    return backend.attention(q_BHTd, k_BGTd, v_BGTd, scale=scale, mask=mask, causal=causal, dropout=dropout)
