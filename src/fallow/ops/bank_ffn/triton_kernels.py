"""Triton kernels that compute the living channels of `bank_ffn`; imported only where Triton is.

`rows_one` is the FFN of one token: a program reads all three rows of its share of the living channels. Else `inner` is
the hidden layer: rows of gate and up that any token of the call needs, each read once and multiplied with every token,
and `down` sums h times rows of the down projection over a share of the banks. `sum` adds the shares up in a fixed
order, so that a call gives the same bits each time; atomic adds would save that launch and lose this. For one token
products are by element, and bytes are what they wait for; for several, tensor cores (at least 16 rows) keep x out of
the way: a row for itself would load all of x again.

Cost: 3 · living rows · D weights read; beside them h and the shares, some hundred KB.
"""

# pyright: reportArgumentType=false
# (Triton annotates compile-time arguments as `tl.constexpr` and takes plain values for them.)

# triton types a jitted function as one that never returns, so a helper's result looks wrong to pyright
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fallow.ops.bank_ffn.triton_tuning import briefly, configs, wait
from fallow.ops.subset_ffn.triton_kernels import value_and_slope

_KEY = ["D", "F", "slots"]


@triton.jit
def hidden(gate, up, factor, ACT: tl.constexpr):
    """act(gate) · up · factor; 0 where the channel is dead, whatever the rest."""
    return tl.where(factor == 0.0, 0.0, value_and_slope(gate, ACT)[0] * up * factor)


@triton.autotune(
    configs=configs(
        ("BR", "BD"),
        (2, 8),
        (1, 1024, 4, 1),
        (1, 2048, 4, 1),
        (1, 4096, 8, 1),
        (2, 1024, 4, 1),
        (4, 512, 4, 1),
        (2, 512, 4, 3),
    ),
    key=_KEY,
    do_bench=briefly,
)
@triton.jit
def inner_one_kernel(
    x, w_gate, w_up, scale_gate, scale_up, coef, live, count, h, D, F, T, banks, slots, stride,
    ACT: tl.constexpr, EARLY: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of BR living channels, for one token, whose lists of living channels are all full: one list for all banks."""
    wait(EARLY)
    k = tl.program_id(0) * BR + tl.arange(0, BR)
    on = k < banks * slots
    c = tl.load(live + k, mask=on, other=0)
    factor = tl.load(coef + c, mask=on, other=0.0)
    row = c.to(tl.int64)[:, None] * stride
    gate = tl.zeros((BR, BD), dtype=tl.float32)
    up = tl.zeros((BR, BD), dtype=tl.float32)
    for done in tl.range(0, D, BD, num_stages=STAGES):
        d = done + tl.arange(0, BD)
        x_tile = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        inside = on[:, None] & (d < D)[None, :]
        gate_tile = tl.load(w_gate + row + d[None, :], mask=inside, other=0)
        up_tile = tl.load(w_up + row + d[None, :], mask=inside, other=0)
        gate += gate_tile.to(tl.float32) * x_tile
        up += up_tile.to(tl.float32) * x_tile
    z_gate = tl.sum(gate, 1)
    z_up = tl.sum(up, 1)
    if scale_gate is not None:
        z_gate *= tl.load(scale_gate + c, mask=on, other=0.0)
        z_up *= tl.load(scale_up + c, mask=on, other=0.0)
    tl.store(h + k, hidden(z_gate, z_up, factor, ACT), mask=on)


@triton.autotune(
    configs=configs(("BR", "BD"), (16, 16), (16, 128, 4, 4), (16, 256, 4, 3), (32, 128, 4, 3)),
    key=_KEY,
    do_bench=briefly,
)
@triton.jit
def inner_many_kernel(
    x, w_gate, w_up, scale_gate, scale_up, coef, live, count, h, D, F, T, banks, slots, stride,
    ACT: tl.constexpr, EARLY: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of BR living channels of a bank for up to BT tokens; products in TYPE."""
    wait(EARLY)
    n = tl.program_id(0)
    first = tl.program_id(1) * BR
    size = tl.load(count + n)
    if first < size:
        slot = first + tl.arange(0, BR)
        on = slot < size
        c = tl.load(live + n * slots + slot, mask=on, other=0)
        row = c.to(tl.int64)[:, None] * stride
        t = tl.arange(0, BT)[None, :]
        gate = tl.zeros((BR, BT), dtype=tl.float32)
        up = tl.zeros((BR, BT), dtype=tl.float32)
        for done in tl.range(0, D, BD, num_stages=STAGES):
            d = done + tl.arange(0, BD)
            x_tile = tl.load(x + t * D + d[:, None], mask=(t < T) & (d < D)[:, None], other=0.0).to(TYPE)
            inside = on[:, None] & (d < D)[None, :]
            w_tile = tl.load(w_gate + row + d[None, :], mask=inside, other=0).to(TYPE)
            gate = tl.dot(w_tile, x_tile, gate, input_precision=PRECISION)
            w_tile = tl.load(w_up + row + d[None, :], mask=inside, other=0).to(TYPE)
            up = tl.dot(w_tile, x_tile, up, input_precision=PRECISION)
        if scale_gate is not None:
            gate *= tl.load(scale_gate + c, mask=on, other=0.0)[:, None]
            up *= tl.load(scale_up + c, mask=on, other=0.0)[:, None]
        inside = on[:, None] & (t < T)
        factor = tl.load(coef + t * F + c[:, None], mask=inside, other=0.0)
        to = h + (t * banks + n) * slots + slot[:, None]
        tl.store(to, hidden(gate, up, factor, ACT), mask=inside)


@triton.autotune(
    configs=configs(
        ("BC", "BD"), (4, 8), (32, 128, 4, 1), (64, 128, 4, 1), (32, 256, 4, 1), (64, 64, 4, 1), (16, 256, 4, 3)
    ),
    key=_KEY,
    do_bench=briefly,
)
@triton.jit
def down_one_kernel(
    h, w_down, scale_down, live, count, part, D, F, T, total, slots, share, stride,
    EARLY: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part[p, d] = the sum over the p-th `share` of all `total` slots of h · w_down[channel, d], for one token, whose
    lists of living channels are all full."""
    wait(EARLY)
    p = tl.program_id(1)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    acc = tl.zeros((BC, BD), dtype=tl.float32)
    last = tl.minimum(p * share + share, total)
    for first in tl.range(p * share, last, BC, num_stages=STAGES):
        k = first + tl.arange(0, BC)
        on = k < last
        c = tl.load(live + k, mask=on, other=0)
        value = tl.load(h + k, mask=on, other=0.0)
        if scale_down is not None:
            value *= tl.load(scale_down + c, mask=on, other=0.0)
        row = c.to(tl.int64)[:, None] * stride
        w_tile = tl.load(w_down + row + d[None, :], mask=on[:, None] & (d < D)[None, :], other=0)
        acc += value[:, None] * w_tile.to(tl.float32)
    tl.store(part + p * D + d, tl.sum(acc, 0), mask=d < D)


@triton.autotune(
    configs=configs(("BC", "BD"), (16, 16), (16, 128, 4, 4), (32, 128, 4, 3), (32, 64, 4, 4)),
    key=_KEY,
    do_bench=briefly,
)
@triton.jit
def down_many_kernel(
    h, w_down, scale_down, live, count, part, D, F, T, total, slots, share, stride,
    EARLY: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `down_one_kernel` for up to BT tokens: part[p, t, d]; products in TYPE."""
    wait(EARLY)
    p = tl.program_id(1)
    d = tl.program_id(0) * BD + tl.arange(0, BD)[None, :]
    in_d = d < D
    t = tl.arange(0, BT)[:, None]
    acc = tl.zeros((BT, BD), dtype=tl.float32)
    last = tl.minimum(p * share + share, total)
    for first in tl.range(p * share, last, BC, num_stages=STAGES):
        k = first + tl.arange(0, BC)
        on = (k < last) & (k % slots < tl.load(count + k // slots, mask=k < last, other=0))
        c = tl.load(live + k, mask=on, other=0)
        value = tl.load(h + t * total + k[None, :], mask=on[None, :] & (t < T), other=0.0)
        if scale_down is not None:
            value *= tl.load(scale_down + c, mask=on, other=0.0)[None, :]
        row = c.to(tl.int64)[:, None] * stride
        w_tile = tl.load(w_down + row + d, mask=on[:, None] & in_d, other=0).to(TYPE)
        acc = tl.dot(value.to(TYPE), w_tile, acc, input_precision=PRECISION)
    tl.store(part + (p * T + t) * D + d, acc, mask=(t < T) & in_d)


@triton.jit
def sums(gate, up, more_gate, more_up):
    """Two sums at once: threads of a program meet once for both."""
    return gate + more_gate, up + more_up


@triton.autotune(
    configs=configs(
        ("PROGRAMS", "BR"),
        (3, 2),
        (264, 1, 4, 4),
        (396, 1, 4, 4),
        (264, 1, 8, 4),
        (264, 2, 8, 3),
        (132, 2, 16, 4),
        (132, 4, 16, 3),
        (132, 1, 8, 8),
        (396, 1, 8, 3),
    ),
    key=["D", "total"],
    do_bench=briefly,
)
@triton.jit
def rows_one_kernel(
    x, w_gate, w_up, w_down, scale_gate, scale_up, scale_down, coef, live, part, D, total, stride,
    ACT: tl.constexpr, EARLY: tl.constexpr, BD: tl.constexpr,
    PROGRAMS: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part[p, d] = the sum of h · w_down[channel, d] over the p-th share of the list of living channels, for one token:
    h needs no other channel's rows, so the three rows of BR channels are on their way together, those of the next
    channels before these are used. Shares are few, for what they write is read again."""
    wait(EARLY)
    p = tl.program_id(0)
    d = tl.arange(0, BD)
    in_d = (d < D)[None, :]
    x_tile = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    share = tl.cdiv(total, PROGRAMS)
    last = tl.minimum(p * share + share, total)
    y = tl.zeros((BR, BD), dtype=tl.float32)
    for first in tl.range(p * share, last, BR, num_stages=STAGES):
        k = first + tl.arange(0, BR)
        on = k < last
        c = tl.load(live + k, mask=on, other=0)
        at = c.to(tl.int64)[:, None] * stride + d[None, :]
        inside = on[:, None] & in_d
        gate_tile = tl.load(w_gate + at, mask=inside, other=0)
        up_tile = tl.load(w_up + at, mask=inside, other=0)
        down_tile = tl.load(w_down + at, mask=inside, other=0)
        factor = tl.load(coef + c, mask=on, other=0.0)
        gate, up = tl.reduce((gate_tile.to(tl.float32) * x_tile, up_tile.to(tl.float32) * x_tile), 1, sums)
        if scale_gate is not None:
            gate *= tl.load(scale_gate + c, mask=on, other=0.0)
            up *= tl.load(scale_up + c, mask=on, other=0.0)
        value = hidden(gate, up, factor, ACT)
        if scale_down is not None:
            value *= tl.load(scale_down + c, mask=on, other=0.0)
        y += value[:, None] * down_tile.to(tl.float32)
    tl.store(part + p * D + d, tl.sum(y, 0), mask=d < D)


@triton.jit
def sum_kernel(part, y, D, T, parts, EARLY: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """y[t, d] = the sum over p of part[p, t, d]."""
    wait(EARLY)
    t = tl.program_id(1)
    p = tl.arange(0, BP)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = (p < parts)[:, None] & (d < D)[None, :]
    terms = tl.load(part + (p[:, None] * T + t) * D + d[None, :], mask=inside, other=0.0)
    tl.store(y + t * D + d, tl.sum(terms, 0).to(y.dtype.element_ty), mask=d < D)
