"""Correctness gates: a backend must match the naive truth in value and every gradient before its speed is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fallow.errors import GateError
from fallow.ops import attention as attention_op
from fallow.ops import block_linear as block_op
from fallow.ops import packed as packed_op
from fallow.ops import subset_ffn as ffn_op
from fallow.ops import subset_linear as linear_op
from fallow.ops.subset_ffn import subset_ffn
from fallow.ops.subset_linear import subset_linear

# relative Frobenius error allowed, by dtype: fp32 sums in another order; bf16 rounds each intermediate (8 bits of
# mantissa)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = (torch.float32, torch.bfloat16)

Op = Callable[..., Tensor]


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in fp64; NaN anywhere is infinite."""
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    return float("inf") if not torch.isfinite(error) else float(error)


def check_all() -> dict[str, float]:
    """Worst relative error of every op of a CPU training step, per backend and dtype. Raises GateError as the checks
    do."""
    return check_subset_ffn() | check_subset_linear() | check_attention()


def check_subset_ffn(
    *, backend: str | None = None, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = DTYPES
) -> dict[str, float]:
    """Worst relative error per dtype of `backend` (default: the one that would run). Raises GateError when one is too
    large."""
    g = torch.Generator().manual_seed(7)
    T, D, F, K = 77, 48, 112, 41  # ragged on purpose
    idx = torch.randperm(F, generator=g)[:K].sort().values.to(device)
    worst: dict[str, float] = {}
    for dtype in dtypes:
        named = _random({"x": (T, D), "w_gate": (F, D), "w_up": (F, D), "w_down": (D, F)}, dtype, device, g)
        chosen = backend or ffn_op._choose(named["x"], idx, None).name
        for act in ffn_op.ACTIVATIONS:
            for omit_in in ffn_op.OMIT_IN:

                def op(x, w_gate, w_up, w_down, *, backend, act=act, omit_in=omit_in):
                    return subset_ffn(x, w_up, w_down, idx, w_gate_FD=w_gate, act=act, omit_in=omit_in, backend=backend)

                pair = partial(op, backend=chosen), partial(op, backend="naive")
                _compare(f"subset_ffn/{chosen}", f"{act}, {omit_in}", *pair, named, dtype, worst)
    return worst


def check_subset_linear(*, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, float]:
    """As `check_subset_ffn`, with kept blocks of rows and of columns."""
    g = torch.Generator().manual_seed(8)
    tokens, out, width, block = 45, 56, 64, 8
    worst: dict[str, float] = {}
    for dtype in dtypes:
        for side, blocks, x_width in (("rows", out // block, width), ("cols", width // block, 3 * block)):
            kept = {side: torch.randperm(blocks, generator=g)[:3].sort().values}
            named = _random({"x": (tokens, x_width), "w": (out, width), "b": (out,)}, dtype, "cpu", g)
            chosen = linear_op._choose(named["x"], None).name

            def op(x, w, b, *, backend, kept=kept):
                return subset_linear(x, w, b, kept.get("rows"), kept.get("cols"), block=block, backend=backend)

            pair = partial(op, backend=chosen), partial(op, backend="naive")
            _compare(f"subset_linear/{chosen}", side, *pair, named, dtype, worst)
    return worst


def check_smet(*, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, float]:
    """As `check_subset_ffn`, for the layers of SMET: packed weights and tiles, each against a masked dense layer."""
    g = torch.Generator().manual_seed(10)
    tokens, out, width, block = 45, 80, 112, 16
    layout = packed_op.layout_of(torch.rand(out, width, generator=g) < 0.3)
    tiles = block_op.tiles_of(torch.rand(out // block, width // block, generator=g) < 0.4, out, width, block)
    n_tiles = int(tiles.rows_N.numel())
    worst: dict[str, float] = {}
    for dtype in dtypes:
        named = _random({"x": (tokens, width), "values": (layout.n_active,), "b": (out,)}, dtype, "cpu", g)

        def fast(x, values, b):
            return packed_op.packed_linear(x, values, layout.bitmap_OB, layout.start_O1, b)

        def truth(x, values, b):
            return x @ torch.zeros(out, width, dtype=x.dtype).masked_scatter(layout.mask(), values).t() + b

        _compare(f"packed_linear/{packed_op._choose(named['x'], None).name}", "", fast, truth, named, dtype, worst)
        named = _random({"x": (tokens, width), "values": (n_tiles, block, block), "b": (out,)}, dtype, "cpu", g)

        def op(x, values, b, *, backend):
            return block_op.block_linear(x, values, tiles, b, backend=backend)

        pair = partial(op, backend=None), partial(op, backend="naive")
        chosen = block_op._choose(named["x"], tiles, None).name
        _compare(f"block_linear/{chosen}", f"tiles of {block}", *pair, named, dtype, worst)
    return worst


def check_attention(*, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, float]:
    """As `check_subset_ffn`, for fallow's CPU attention: causal, and with documents packed into one row."""
    g = torch.Generator().manual_seed(9)
    B, H, G, T, d = 2, 6, 2, 150, 16
    document_T = (torch.arange(T) >= 60).int()
    packed = (document_T[:, None] == document_T[None, :]).tril()[None, None]
    worst: dict[str, float] = {}
    for dtype in dtypes:
        named = _random({"q": (B, H, T, d), "k": (B, G, T, d), "v": (B, G, T, d)}, dtype, "cpu", g)
        for what, mask in (("causal", None), ("packed", packed)):
            options = {"scale": 0.25, "mask": mask, "causal": mask is None}
            fast = partial(attention_op.cpu.attention, **options, dropout=0.0)
            slow = partial(attention_op.naive.attention, **options, dropout=0.0)
            _compare("attention/cpu", what, fast, slow, named, dtype, worst)
    return worst


def _random(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str, g: torch.Generator
) -> dict[str, Tensor]:
    drawn = {n: torch.randn(s, generator=g, dtype=torch.float64) / s[-1] ** 0.5 for n, s in shapes.items()}
    return {n: t.to(dtype).to(device) for n, t in drawn.items()}


def _compare(
    who: str, how: str, op: Op, truth: Op, named: dict[str, Tensor], dtype: torch.dtype, worst: dict[str, float]
) -> None:
    """Raise GateError when value or gradients of `op` differ from `truth`'s in fp64; note the largest difference."""
    got = _value_and_gradients(op, list(named.values()))
    want = _value_and_gradients(truth, [t.double() for t in named.values()])
    for name, a, b in zip(("y", *(f"d{n}" for n in named)), got, want, strict=True):
        error = relative_error(a, b)
        if error > TOLERANCE[dtype]:
            raise GateError(
                f"{who}: {name} differs from naive by {error:.1e} ({dtype}, {how}); {TOLERANCE[dtype]:.0e} is allowed;"
                " no speed is reported"
            )
        key = f"{who}/{str(dtype).removeprefix('torch.')}"
        worst[key] = max(worst.get(key, 0.0), error)


def _value_and_gradients(op: Op, tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = op(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(dy.to(leaves[0].dtype).to(y.device).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
