"""One linear layer of tiles, forward and backward, against the fastest dense form: what `block_linear` gives by itself.

Dense runs in bf16 and in fp32 with casts, and the faster one counts: CPUs with AVX-512-BF16 but without AMX multiply
fp32 twice as fast. Both dense forms compute y, dx and dW and nothing else. `ideal` is the ratio of multiplications,
whole tiles counted. Each row's kernel is first checked against the naive truth in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fallow.bench.gate import TOLERANCE, relative_error
from fallow.bench.harness import Step, interleave
from fallow.errors import GateError
from fallow.ops import block_linear as op
from fallow.ops.block_linear import Tiles, block_linear, tiles_of

SHAPES = ((5461, 2048), (2048, 5461), (4096, 4096))
BLOCKS = (16, 32, 64)
DENSITIES = (0.1, 0.25, 0.5)


def _dense_bf16(x_TI: Tensor, w_OI: Tensor, dy_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(x_TI, w_OI), dy_TO @ w_OI, dy_TO.t() @ x_TI


def _dense_fp32(x_TI: Tensor, w_OI: Tensor, dy_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same through fp32 GEMMs; x and W are cast once for both passes."""
    x, w, dtype = x_TI.float(), w_OI.float(), x_TI.dtype
    y = F.linear(x, w).to(dtype)
    dy = dy_TO.float()
    return y, (dy @ w).to(dtype), (dy.t() @ x).to(dtype)


def _tiles(x: Tensor, values: Tensor, tiles: Tiles, dy: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    y = block_linear(x, values, tiles, backend=backend)
    return y.detach(), *torch.autograd.grad(y, (x, values), dy)


def random_tiles(out: int, in_: int, block: int, density: float, g: torch.Generator) -> Tiles:
    """`density` of the grid, drawn uniformly; at least one tile."""
    R, C = -(-out // block), -(-in_ // block)
    mask = torch.zeros(R * C, dtype=torch.bool)
    mask[torch.randperm(R * C, generator=g)[: max(1, round(density * R * C))]] = True
    return tiles_of(mask.view(R, C), out, in_, block)


def _check(x: Tensor, values: Tensor, tiles: Tiles, dy: Tensor, what: str) -> str:
    """The backend that ran. Raises GateError when a result differs from naive in fp64."""
    got, backend = _tiles(x, values, tiles, dy), op.last_used
    x64, values64 = (t.detach().double().requires_grad_() for t in (x, values))
    want = _tiles(x64, values64, tiles, dy.double(), backend="naive")
    for name, a, b in zip(("y", "dx", "dvalues"), got, want, strict=True):
        error = relative_error(a, b)
        if error > TOLERANCE[x.dtype]:
            raise GateError(
                f"block_linear/{backend}: {name} differs from naive by {error:.1e} ({what}); {TOLERANCE[x.dtype]:.0e}"
                " is allowed; no speed is reported"
            )
    return backend


def layer_rows(
    *,
    rounds: int = 7,
    tokens: int = 2048,
    shapes: Sequence[tuple[int, int]] | None = None,
    blocks: Sequence[int] = BLOCKS,
    densities: Sequence[float] = DENSITIES,
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:
    """One row per shape (out, in), tile side and density; times are medians over `rounds` interleaved rounds.

    Raises:
        GateError: a kernel differs from its truth; nothing is timed then.
    """
    rows: list[dict[str, Any]] = []
    for out, in_ in shapes or SHAPES:
        g = torch.Generator().manual_seed(1)
        x, w, dy = (
            torch.randn(s, generator=g).to(dtype) / s[1] ** 0.5 for s in ((tokens, in_), (out, in_), (tokens, out))
        )
        forms: dict[str, Step] = {"dense/fp32": partial(_dense_fp32, x, w, dy)}
        if dtype != torch.float32:
            forms[f"dense/{str(dtype).removeprefix('torch.')}"] = partial(_dense_bf16, x, w, dy)
        shape_rows: dict[str, dict[str, Any]] = {}
        for block in blocks:
            for density in densities:
                tiles = random_tiles(out, in_, block, density, g)
                values = (torch.randn(tiles.shape, generator=g) / in_**0.5).to(dtype).requires_grad_()
                leaf, form = x.detach().requires_grad_(), f"tiles/{block}/{density:g}"
                shape_rows[form] = {
                    "case": f"layer-{out}x{in_}/b{block}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": tokens,
                    "density": density,
                    "block": block,
                    "ideal": out * in_ / values.numel(),
                    "backend": _check(leaf, values, tiles, dy, f"{out}×{in_}, tiles of {block}, density {density:g}"),
                }
                forms[form] = partial(_tiles, leaf, values, tiles, dy)
        timing = interleave(forms, rounds=rounds)
        dense = timing.fastest("dense/")
        for form, row in shape_rows.items():
            ratio = timing.ratio(dense, form)
            rows.append(
                row
                | {
                    "dense_ms": 1e3 * timing.median(dense),
                    "sparse_ms": 1e3 * timing.median(form),
                    "ratio": ratio,
                    "ratio_quartiles": timing.spread(dense, form),
                    "efficiency": ratio / row["ideal"],
                    "dense_form": dense,
                    "dense_forms_ms": {n: 1e3 * timing.median(n) for n in forms if n.startswith("dense/")},
                    "rounds": rounds,
                }
            )
    return rows
