"""`Int8Linear`: a linear layer of an FFN whose weight is kept in 8 bits, with one fp32 scale per channel of the FFN.

Rows are channels, as the op `bank_ffn` reads them: outputs of gate and up projections, inputs of down projections. Who
asks for `weight` gets all of it, computed anew; a layer that kept it would save nothing. For serving: what `codes` and
`scale` hold is no parameter. Outlier-aware schemes lose less, but need every row of a token, which decoding leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fallow.ops.bank_ffn import Int8Rows, int8_rows


class Int8Linear(nn.Linear):
    """In the place of `stock`, with its weight rounded.

    Args:
        stock: the layer; on the meta device the result has no memory either.
        along_inputs: whether the channels are its inputs.
    """

    codes: Tensor
    scale: Tensor
    like: Tensor
    """Empty; its dtype is that of `weight`, and follows `.to(dtype)`."""

    def __init__(self, stock: nn.Linear, *, along_inputs: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.along_inputs = stock.in_features, stock.out_features, along_inputs
        weight_OI = stock.weight.detach()
        codes, scale = int8_rows(weight_OI.t() if along_inputs else weight_OI)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("like", weight_OI.new_empty(0), persistent=False)
        self.register_parameter("bias", stock.bias)

    def rows(self, first: int = 0, last: int | None = None) -> Int8Rows:
        """Views of the rows of channels `first` to `last`."""
        if first == 0 and last is None:
            return Int8Rows(self.codes, self.scale)
        return Int8Rows(self.codes[first:last], self.scale[first:last])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter of nn.Linear, computed here
        """[O, I]."""
        weight = self.rows().dense(self.like.dtype)
        return weight.t() if self.along_inputs else weight

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
        """`.to(dtype)` is for what is computed: scales stay fp32."""
        exact = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != exact.dtype:
            self.scale = exact.to(self.codes.device)
        return self
