"""What `bank_ffn` reads from memory, which is what decoding costs, against the dense FFN.

Tokens choose for themselves: of T tokens with a share k of the channels each, 1 - (1 - k)^T of all rows are wanted by
some token. Measured on 2 cores at 3584×18944 it is within 10 % of these ratios for 1 to 8 tokens.
"""

from __future__ import annotations

from fallow.ops.bank_ffn.select import Int8Rows, Predictor, Weight, tensor_of


def bytes_read(predictor: Predictor, w_up_FD: Weight, *, bank: int, keep: int, tokens: int = 1) -> float:
    """Bytes of weights and predictor that a call of `tokens` independent tokens reads, on average."""
    rows = 1 - (1 - keep / bank) ** tokens
    own = 0 if predictor.kind == "scores" else sum(t.nbytes for t in predictor.tensors)
    own += sum(t.nbytes for t in predictor.compensation or ())
    return rows * dense_bytes(w_up_FD) + own


def dense_bytes(w_up_FD: Weight) -> int:
    """Bytes of the three weights."""
    return 3 * (tensor_of(w_up_FD).nbytes + (w_up_FD.scale_F.nbytes if isinstance(w_up_FD, Int8Rows) else 0))


def break_even(predictor: Predictor, w_up_FD: Weight, *, bank: int, keep: int, most: int = 8) -> int:
    """The most tokens of one call, up to `most`, for which fewer bytes are read than the dense FFN's; 0: for none.

    With more, the dense FFN is faster than any form of this one; `bank_ffn` itself does not change over there, because
    its dense form (a mask between GEMMs) is slower than its kernels up to 8 tokens.
    """
    dense = dense_bytes(w_up_FD)
    fewer = (t for t in range(most, 0, -1) if bytes_read(predictor, w_up_FD, bank=bank, keep=keep, tokens=t) < dense)
    return next(fewer, 0)
