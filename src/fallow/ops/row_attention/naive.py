"""`row_attention` as torch's scaled dot-product attention: the truth, and what runs where the compiled one cannot."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

name = "naive"


def available() -> tuple[bool, str]:
    return True, "torch's attention"


def usable(q_BHd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, mask_BL: Tensor | None) -> tuple[bool, str]:
    return True, "works on every device and dtype"


def row_attention(q_BHd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, mask_BL: Tensor | None, scale: float) -> Tensor:
    """Arguments as `fallow.ops.row_attention.row_attention`."""
    q_BGnd = q_BHd.unflatten(1, (k_BGLd.shape[1], -1))
    mask = None if mask_BL is None else mask_BL[:, None, None]
    return F.scaled_dot_product_attention(q_BGnd, k_BGLd, v_BGLd, attn_mask=mask, scale=scale).flatten(1, 2)
