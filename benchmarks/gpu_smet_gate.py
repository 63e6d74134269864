"""The gate of SMET's kernels for benchmarks/gpu_smet.py: each Triton path against its truth in fp64."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fallow.bench.gate import Op


def gate_smet(device: str, interpreted: bool) -> dict[str, float]:
    """Packed weights (moved bit for bit) and both sparse layers, in fp64 truth: value and every gradient, each dtype.

    Through the interpreter `packed_linear` runs on the backend that serves the CPU, as its path says: it takes no
    backend; the Triton kernels it would call are held to the truth by themselves.
    """
    worst: dict[str, float] = {}
    _gate_packed(device, interpreted, worst)
    for block in (16, 48) if interpreted else (16, 48, 64, 128, 256):
        _gate_block(device, interpreted, block, worst)
    return worst


def _gate_packed(device: str, interpreted: bool, worst: dict[str, float]) -> None:
    import torch

    from fallow.bench.gate import TOLERANCE
    from fallow.errors import GateError
    from fallow.ops import packed

    tokens, n_out, n_in = (19, 24, 1043) if interpreted else (333, 520, 2059)  # more columns than a program's block
    g = torch.Generator().manual_seed(12)
    mask = (torch.rand(n_out, n_in, generator=g) < 0.3).to(device)
    layout = packed.layout_of(mask)
    for dtype in TOLERANCE:
        dense = torch.randn(n_out, n_in, generator=g).to(dtype).to(device)
        values = torch.full((layout.n_active,), float("nan"), dtype=dtype, device=device)
        packed.compress(dense, layout, out=values, backend="triton")
        _hold("packed-triton", "compress", values, dense[mask].double(), dtype, worst)
        whole = torch.full_like(dense, float("nan"))
        packed.expand(values, layout, out=whole, backend="triton")
        _hold("packed-triton", "expand", whole, dense.double() * mask, dtype, worst)

        def fast(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
            return packed.packed_linear(x, values, layout.bitmap_OB, layout.start_O1, bias)

        def truth(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
            return x @ torch.zeros(n_out, n_in, dtype=x.dtype, device=device).masked_scatter(mask, values).t() + bias

        named = _random({"x": (tokens, n_in), "values": (layout.n_active,), "bias": (n_out,)}, dtype, device, g)
        got, want = _value_and_gradients(fast, named), _value_and_gradients(truth, named, exact=True)
        path = f"packed_linear-{packed.last_used}"
        if packed.last_used != "triton" and device != "cpu":
            raise GateError(f"{path}: packed_linear ran on {packed.last_used!r}; on a GPU it must run on Triton")
        for name, reference in want.items():
            _hold(path, name, got[name], reference, dtype, worst)


def _gate_block(device: str, interpreted: bool, block: int, worst: dict[str, float]) -> None:
    """Ragged edges, an empty row and an empty column of tiles."""
    import torch

    from fallow.bench.gate import TOLERANCE
    from fallow.ops.block_linear import block_linear, tiles_of

    tokens, n_out, n_in = (19, 3 * block + 5, 5 * block - 3) if interpreted else (333, 5 * block + 24, 9 * block - 8)
    g = torch.Generator().manual_seed(13)
    mask = torch.rand(-(-n_out // block), -(-n_in // block), generator=g) < 0.5
    mask[1], mask[:, 2], mask[-1, -1] = False, False, True
    tiles = tiles_of(mask.to(device), n_out, n_in, block)
    shapes = {"x": (tokens, n_in), "values": (int(mask.sum()), block, block), "bias": (n_out,)}
    for dtype in TOLERANCE:
        if interpreted and dtype == torch.bfloat16:
            print(f"  block_linear-triton/bfloat16 (tiles of {block}): left out, the interpreter's dot has no bfloat16")
            continue
        named = _random(shapes, dtype, device, g)

        def op(x: Tensor, values: Tensor, bias: Tensor, *, backend: str) -> Tensor:
            return block_linear(x, values, tiles, bias, backend=backend)

        got = _value_and_gradients(partial(op, backend="triton"), named)
        want = _value_and_gradients(partial(op, backend="naive"), named, exact=True)
        for name, reference in want.items():
            _hold("block_linear-triton", f"{name} with tiles of {block}", got[name], reference, dtype, worst)


def _hold(path: str, what: str, got: Tensor, want: Tensor, dtype: torch.dtype, worst: dict[str, float]) -> None:
    """Note the error of `got`; raise GateError when it is too large."""
    from fallow.bench.gate import TOLERANCE, relative_error
    from fallow.errors import GateError

    key, error = f"{path}/{str(dtype).removeprefix('torch.')}", relative_error(got, want)
    worst[key] = max(worst.get(key, 0.0), error)
    if error > TOLERANCE[dtype]:
        raise GateError(
            f"{key}: {what} differs from naive by {error:.1e}; {TOLERANCE[dtype]:.0e} is allowed; no speed is reported"
        )


def _random(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str, g: torch.Generator
) -> dict[str, Tensor]:
    import torch

    drawn = {n: torch.randn(s, generator=g) / (1 if n == "values" else s[-1] ** 0.5) for n, s in shapes.items()}
    return {n: t.to(dtype).to(device) for n, t in drawn.items()}


def _value_and_gradients(op: Op, named: dict[str, Tensor], *, exact: bool = False) -> dict[str, Tensor]:
    """`exact`: of the same numbers in fp64."""
    import torch

    leaves = {k: (v.double() if exact else v.clone()).requires_grad_() for k, v in named.items()}
    y = op(**leaves)
    dtype = next(iter(named.values())).dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy.to(y.device).to(y.dtype))
    return {"y": y.detach()} | {f"d {k}": v.grad for k, v in leaves.items() if v.grad is not None}
