"""A topology update of single weights, on packed bits and values, a few rows at a time.

`topology.move` says what an update is, on whole masks; for a layer of 11M weights its scores, draws and indices are
300 MB that a memory-efficient method must not need. Here at most a million weights are looked at together. Under
`fan_in` rows are independent and each group of rows goes through `topology.move`; otherwise the dying are found among
the packed values, and the born are drawn by rank among the inactive.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fallow.methods.smet import topology
from fallow.ops import packed
from fallow.ops.packed import Layout
from fallow.ops.packed import naive as bits

AT_ONCE = 1 << 20


def row_groups(layout: Layout) -> Iterator[tuple[int, int, int, int]]:
    """(first row, last row + 1, first packed entry, last + 1) of consecutive groups of about `AT_ONCE` weights."""
    n_out, n_in = layout.shape
    rows = max(1, AT_ONCE // n_in)
    for lo in range(0, n_out, rows):
        hi = min(lo + rows, n_out)
        yield lo, hi, int(layout.start_O1[lo]), int(layout.start_O1[hi])


def rows_of(layout: Layout, lo: int, hi: int) -> Layout:
    """The layout of rows lo to hi alone."""
    start_O1 = layout.start_O1[lo : hi + 1] - layout.start_O1[lo]
    return Layout(layout.bitmap_OB[lo:hi], start_O1, layout.n_in, int(start_O1[-1]))


def recode(x: Tensor, old: Layout, new: Layout) -> Tensor:
    """A packed tensor in the order of `old` in the order of `new`, zeros for entries that `old` lacks; x's shape."""
    flat = x.reshape(-1)
    out = torch.empty(new.n_active, dtype=x.dtype, device=x.device)
    for lo, hi, first, last in row_groups(old):
        dense = packed.scratch((hi - lo, old.n_in), x.dtype, x.device)
        packed.expand(flat[first:last], rows_of(old, lo, hi), out=dense)
        part = out[int(new.start_O1[lo]) : int(new.start_O1[hi])]
        packed.compress(dense, rows_of(new, lo, hi), out=part)
    return out.view(x.shape)


def moved(
    layout: Layout,
    values: Tensor,
    fraction: float,
    *,
    per_row: bool,
    g: torch.Generator,
    candidates_OB: Tensor | None = None,
) -> Tensor:
    """The bitmap [O, ceil(I/8)] after one update.

    Args:
        layout: the topology now.
        values: packed weights in any shape, whose smallest magnitudes die.
        fraction: of the active weights that are replaced.
        per_row: the same number in every row.
        g: generator of the random growth.
        candidates_OB: bitmap of as many inactive weights as die, to be born; None draws them.
    """
    whole = _moved_rows if per_row else _moved_anywhere
    return whole(layout, values.reshape(-1), fraction, g, candidates_OB)


def _moved_rows(
    layout: Layout, values: Tensor, fraction: float, g: torch.Generator, candidates_OB: Tensor | None
) -> Tensor:
    bitmap_OB = torch.empty_like(layout.bitmap_OB)
    for lo, hi, first, last in row_groups(layout):
        part = rows_of(layout, lo, hi)
        growth = None if candidates_OB is None else bits.unpack_bits(candidates_OB[lo:hi], layout.n_in).float()
        magnitude = packed.expand(values[first:last].float().abs(), part)
        mask = topology.move(part.mask(), magnitude, fraction, per_row=True, g=g, growth_RC=growth)
        bitmap_OB[lo:hi] = bits.pack_bits(mask)
    return bitmap_OB


def _moved_anywhere(
    layout: Layout, values: Tensor, fraction: float, g: torch.Generator, candidates_OB: Tensor | None
) -> Tensor:
    units = layout.shape[0] * layout.n_in
    n = topology.moving(layout.n_active, units, fraction)
    survives = torch.ones(layout.n_active, dtype=torch.uint8, device=values.device)
    survives[values.float().abs().topk(n, largest=False, sorted=False).indices] = 0
    ranks = distinct(units - layout.n_active, n, g).to(values.device) if candidates_OB is None else None
    bitmap_OB, before = torch.empty_like(layout.bitmap_OB), 0
    for lo, hi, first, last in row_groups(layout):
        part = rows_of(layout, lo, hi)
        mask = packed.expand(survives[first:last], part).bool()
        if ranks is None:
            assert candidates_OB is not None
            mask |= bits.unpack_bits(candidates_OB[lo:hi], layout.n_in)
        else:
            places = (~part.mask()).view(-1).nonzero().view(-1)
            mine = ranks[(ranks >= before) & (ranks < before + len(places))]
            mask.view(-1)[places[mine - before]] = True
            before += len(places)
        bitmap_OB[lo:hi] = bits.pack_bits(mask)
    return bitmap_OB


def distinct(n: int, k: int, g: torch.Generator) -> Tensor:
    """k different numbers of [0, n), uniformly, sorted. Draws until enough differ: randperm would need n of them."""
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < k:
        more = torch.randint(n, (k - len(found),), generator=g)
        found = torch.cat([found, more]).unique()
    return found
