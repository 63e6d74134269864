"""Arithmetic of one training step of a decoder, dense and with some channels and heads omitted: the ideal ratio.

Counts multiply-adds of the linear layers and of causal attention, ×3 for forward, input gradient and weight gradient.
Norms,
activations, the softmax and the optimizer are left out: what they cost is the gap between ratio and ideal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Shape:
    """A decoder's widths. `vocab=0` leaves the head out, as one-layer slices do."""

    d_model: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int = 0

    def attention_flops(self, tokens: int, seq_len: int, kept: float) -> float:
        """Forward FLOPs of one attention with a share `kept` of its heads (whole KV groups)."""
        width = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        linear = 2 * tokens * self.d_model * (2 * width + 2 * kv)
        scores = 2 * 2 * tokens * (seq_len / 2) * width
        return (linear + scores) * kept

    def ffn_flops(self, tokens: int, kept: float) -> float:
        return 6 * tokens * self.d_model * self.ffn * kept

    def step_flops(
        self,
        tokens: int,
        seq_len: int,
        kept_ffn: Sequence[float] | None = None,
        kept_heads: Sequence[float] | None = None,
        *,
        omit_in: str = "forward+backward",
    ) -> float:
        """FLOPs of forward and backward; `kept_*` are shares per layer, None is all; `omit_in` as in `subset_ffn`."""
        kept_ffn = kept_ffn or [1.0] * self.layers
        kept_heads = kept_heads or [1.0] * self.layers
        exact = {"forward+backward": 0, "backward": 1, "weight_grad": 2}[omit_in]  # of three passes over the FFN
        total = 3 * 2 * tokens * self.d_model * self.vocab
        for f, h in zip(kept_ffn, kept_heads, strict=True):
            total += (exact + (3 - exact) * f) * self.ffn_flops(tokens, 1.0) + 3 * self.attention_flops(
                tokens, seq_len, h
            )
        return total
