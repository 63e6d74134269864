"""Triton kernels that score channels and choose the living ones of every bank; imported only where Triton is.

One launch prepares x (thin product V x, or x rounded to bytes), one scores a bank, ranks it and writes what the FFN's
kernels read: `coef` [T, F], the factor of each channel, 0 where it is dead; `live` [N, S], the channels of each bank
that live for any token, ascending, and `count` [N], how many. Ranks are counted: a channel lives when fewer than `keep`
of its bank are ahead of it, by score or at equal score by index, so that ties need no sort.

Reading the union once and computing every token on it costs idle FLOPs; the obvious alternative, a list per token,
reads a weight row as often as tokens want it. Low-bit codes lie as the CPU reads them (pack.py), which suits a GPU too:
four inputs of a channel are one word, multiplied by dp4a; products of whole numbers are exact.
Axes of tiles: channel, input (or word of inputs), token.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false
# (Triton annotates compile-time arguments as `tl.constexpr` and takes plain values for them.)

# triton types a jitted function as one that never returns, so a helper's result looks wrong to pyright
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import triton
import triton.language as tl

from fallow.ops.bank_ffn.triton_tuning import briefly, configs, fitting, wait
from fallow.ops.subset_ffn.triton_kernels import value_and_slope

_FITTING = {"early_config_prune": fitting}


@triton.jit
def living(s, keep, BANK: tl.constexpr, BB: tl.constexpr):
    """Which of the scores s [BB] are among the `keep` largest of the first BANK."""
    i = tl.arange(0, BB)
    s = tl.where(s == s, s, float("-inf"))  # NaN below everything
    ahead = (s[None, :] > s[:, None]) | ((s[None, :] == s[:, None]) & (i[None, :] < i[:, None]))
    ahead = ahead & (i[None, :] < BANK)
    return (tl.sum(ahead.to(tl.int32), 1) < keep) & (i < BANK)


@triton.jit
def settle(
    s, tilt, coef, live, count, n, F, keep, slots,
    LOGIT: tl.constexpr, SMOOTH: tl.constexpr, T: tl.constexpr, BANK: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Tilt the scores of bank n, [BB] for each token; write the factors, the union over tokens and its size."""
    i = tl.arange(0, BB)
    c = n * BANK + i
    inside = i < BANK
    union = tl.zeros((BB,), dtype=tl.int32)
    for t in tl.static_range(T):
        score = s[t]
        if tilt is not None:
            if LOGIT:
                score += tl.load(tilt + c, mask=inside, other=0.0)
            else:
                score *= tl.load(tilt + c, mask=inside, other=0.0)
        lives = living(score, keep, BANK, BB)
        factor = tl.zeros((BB,), dtype=tl.float32) + 1.0
        if SMOOTH:
            factor = 2.0 / (1.0 + tl.exp(-score))
        tl.store(coef + t * F + c, tl.where(lives, factor, 0.0), mask=inside)
        union = union | lives.to(tl.int32)
    at = tl.cumsum(union, 0) - 1
    tl.store(live + n * slots + at, c, mask=union > 0)
    tl.store(count + n, tl.sum(union, 0))


@triton.jit
def mask_kernel(scores, out, keep, BANK: tl.constexpr, BB: tl.constexpr):
    """out[t, c] = whether c lives; one program per token and bank."""
    n = tl.program_id(0)
    first = n.to(tl.int64) * BANK
    i = tl.arange(0, BB)
    s = tl.load(scores + first + i, mask=i < BANK, other=0.0).to(tl.float32)
    tl.store(out + first + i, living(s, keep, BANK, BB).to(tl.uint8), mask=i < BANK)


@triton.jit
def given_kernel(
    scores, tilt, coef, live, count, F, keep, slots,
    SMOOTH: tl.constexpr, EARLY: tl.constexpr, T: tl.constexpr, BANK: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Scores [T, F] computed elsewhere."""
    wait(EARLY)
    n = tl.program_id(0)
    i = tl.arange(0, BB)
    s = ()
    for t in tl.static_range(T):
        s += (tl.load(scores + t * F + n * BANK + i, mask=i < BANK, other=0.0).to(tl.float32),)
    settle(s, tilt, coef, live, count, n, F, keep, slots, True, SMOOTH, T, BANK, BB)


@triton.autotune(
    configs=configs(("BR", "BD"), (4, 8), (1, 4096, 4, 1), (1, 4096, 8, 1), (1, 2048, 4, 1), (1, 1024, 4, 1)),
    key=["D", "R", "T"],
    prune_configs_by=_FITTING,
    do_bench=briefly,
)
@triton.jit
def thin_kernel(
    x, v_gate, v_up, scale_gate, scale_up, z, D, R,
    EARLY: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """z[m, t, r] = v[r] · x[t], times scale[r] for int8 rows; program axis 1 is m, gate or up. The next tile of v is
    always on its way, the first before the kernel ahead has ended."""
    m = tl.program_id(1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    in_r = r < R
    v = v_gate
    scale = scale_gate
    if v_up is not None:  # noqa: SIM102 (one is known when compiled, one when run)
        if m == 1:
            v = v_up
            scale = scale_up
    d = tl.arange(0, BD)
    w = tl.load(v + r[:, None] * D + d[None, :], mask=in_r[:, None] & (d < D)[None, :], other=0)
    wait(EARLY)
    acc = (tl.zeros((BR, BD), dtype=tl.float32),) * T
    for done in tl.range(0, D, BD, num_stages=STAGES):
        d = done + tl.arange(0, BD)
        e = d + BD
        coming = tl.load(v + r[:, None] * D + e[None, :], mask=in_r[:, None] & (e < D)[None, :], other=0)
        longer = ()
        for t in tl.static_range(T):
            x_tile = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)
            longer += (acc[t] + w.to(tl.float32) * x_tile[None, :],)
        acc = longer
        w = coming
    for t in tl.static_range(T):
        out = tl.sum(acc[t], 1)
        if scale is not None:
            out *= tl.load(scale + r, mask=in_r, other=0.0)
        tl.store(z + (m * T + t) * R + r, out, mask=in_r)


@triton.autotune(
    configs=configs(("BR",), (4,), (256, 8, 1), (128, 8, 1), (64, 8, 1), (32, 8, 1)),
    key=["F", "R", "BANK", "T"],
    prune_configs_by=_FITTING,
    do_bench=briefly,
)
@triton.jit
def factors_kernel(
    z, u_gate, u_up, scale_gate, scale_up, tilt, coef, live, count, F, R, keep, slots,
    ACT: tl.constexpr, SMOOTH: tl.constexpr, EARLY: tl.constexpr,
    T: tl.constexpr, BANK: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """s = u_gate z, or with u_up |act(u_gate z_0) · (u_up z_1)|; tiles of u on their way as in `thin_kernel`."""
    n = tl.program_id(0)
    i = tl.arange(0, BB)
    c = n * BANK + i
    r = tl.arange(0, BR)
    at = c[:, None] * R + r[None, :]
    inside = (i < BANK)[:, None] & (r < R)[None, :]
    w_gate = tl.load(u_gate + at, mask=inside, other=0)
    w_up = w_gate
    if u_up is not None:
        w_up = tl.load(u_up + at, mask=inside, other=0)
    wait(EARLY)
    gate = (tl.zeros((BB, BR), dtype=tl.float32),) * T
    up = gate
    for done in tl.range(0, R, BR, num_stages=STAGES):
        r = done + tl.arange(0, BR)
        at = c[:, None] * R + (r + BR)[None, :]
        inside = (i < BANK)[:, None] & (r + BR < R)[None, :]
        coming = tl.load(u_gate + at, mask=inside, other=0)
        longer = ()
        for t in tl.static_range(T):
            z_tile = tl.load(z + t * R + r, mask=r < R, other=0.0)[None, :]
            longer += (gate[t] + w_gate.to(tl.float32) * z_tile,)
        gate = longer
        w_gate = coming
        if u_up is not None:
            coming = tl.load(u_up + at, mask=inside, other=0)
            longer = ()
            for t in tl.static_range(T):
                z_tile = tl.load(z + (T + t) * R + r, mask=r < R, other=0.0)[None, :]
                longer += (up[t] + w_up.to(tl.float32) * z_tile,)
            up = longer
            w_up = coming
    s = ()
    for t in tl.static_range(T):
        score = tl.sum(gate[t], 1)
        if scale_gate is not None:
            score *= tl.load(scale_gate + c, mask=i < BANK, other=0.0)
        if u_up is not None:
            other = tl.sum(up[t], 1)
            if scale_up is not None:
                other *= tl.load(scale_up + c, mask=i < BANK, other=0.0)
            score = tl.abs(value_and_slope(score, ACT)[0] * other)
        s += (score,)
    settle(s, tilt, coef, live, count, n, F, keep, slots, u_up is None, SMOOTH, T, BANK, BB)


@triton.jit
def round_kernel(
    x, words, zero, scale, D, G,
    EARLY: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, J: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """x[t] in groups as pack.round_x has it: `words` [T, G·J, 8/BITS], four inputs a word, `scale` [T, G], and `zero`
    [T, G·J], what the inputs of a word of codes add because codes have no sign: -(2^BITS - 1) times their sum."""
    PER: tl.constexpr = 8 // BITS
    wait(EARLY)
    g = tl.program_id(0)
    t = tl.program_id(1)
    j = tl.arange(0, BJ)
    p = tl.arange(0, PER)
    b = tl.arange(0, 4)
    in_j = j < J
    i = (j[:, None, None] * PER + p[None, :, None]) * 4 + b[None, None, :]
    d = g * GROUP + i
    v = tl.load(x + t * D + d, mask=in_j[:, None, None] & (d < D), other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.max(tl.abs(v), 2), 1), 0)
    step = tl.div_rn(largest, 127.0)
    inverse = tl.where(step > 0, tl.div_rn(1.0, step), 0.0)
    q = v * inverse
    q = (q + 12582912.0) - 12582912.0  # to the nearest whole number, halves to even
    q = tl.minimum(tl.maximum(q, -127.0), 127.0).to(tl.int32)
    word = tl.xor_sum((q & 255) << (8 * b[None, None, :]), 2)
    at = (t * G + g) * J + j
    tl.store(words + at[:, None] * PER + p[None, :], word, mask=in_j[:, None])
    tl.store(zero + at, -((1 << BITS) - 1) * tl.sum(tl.sum(q, 2), 1), mask=in_j)
    tl.store(scale + t * G + g, step)


@triton.jit
def dot4(codes, x, acc, PLAIN: tl.constexpr):
    """acc + the sum over four bytes of codes (without sign) times x (with sign)."""
    if PLAIN:
        for b in tl.static_range(4):
            acc += ((codes >> (8 * b)) & 255) * ((x << (24 - 8 * b)) >> 24)
    else:
        acc = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    return acc


@triton.autotune(
    configs=configs(("BQ",), (4,), (16, 4, 3), (16, 8, 4), (32, 8, 3), (64, 8, 2)),
    key=["F", "Q", "BANK", "T"],
    prune_configs_by=_FITTING,
    do_bench=briefly,
)
@triton.jit
def codes_kernel(
    words, zero, scale, codes, scales, tilt, coef, live, count, F, Q, keep, slots,
    ACT: tl.constexpr, BITS: tl.constexpr, J: tl.constexpr, PLAIN: tl.constexpr, EARLY: tl.constexpr,
    T: tl.constexpr, BANK: tl.constexpr, BB: tl.constexpr,
    BQ: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """s = |act(gate) · up| of low-bit copies; Q = G·J words of codes per channel, J of a group."""
    PER: tl.constexpr = 8 // BITS
    MASK: tl.constexpr = 0x1E1E1E1E if BITS == 4 else 0x06060606
    wait(EARLY)
    n = tl.program_id(0)
    i = tl.arange(0, BB)[:, None]
    c = n * BANK + i
    block = c // 16
    lane = c % 16
    G = Q // J
    gate = (tl.zeros((BB, BQ), dtype=tl.float32),) * T
    up = gate
    for done in tl.range(0, Q, BQ, num_stages=STAGES):
        q = done + tl.arange(0, BQ)
        g = q // J
        in_q = q < Q
        inside = (i < BANK) & in_q[None, :]
        at = block * (Q * 32) + (g * (J * 32) + (q % J) * 16)[None, :] + lane
        code_gate = tl.load(codes + at, mask=inside, other=0)
        code_up = tl.load(codes + at + J * 16, mask=inside, other=0)
        at = block * (G * 32) + (g * 32)[None, :] + lane
        scale_gate = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        scale_up = tl.load(scales + at + 16, mask=inside, other=0.0).to(tl.float32)
        longer_gate = ()
        longer_up = ()
        for t in tl.static_range(T):
            sum_gate = tl.zeros((BB, BQ), dtype=tl.int32) + tl.load(zero + t * Q + q, mask=in_q, other=0)[None, :]
            sum_up = sum_gate
            for p in tl.static_range(PER):
                x = tl.load(words + (t * Q + q) * PER + p, mask=in_q, other=0)[None, :]
                if p == 0:  # twice the code, so that half a step is a whole number
                    sum_gate = dot4((code_gate << 1) & MASK, x, sum_gate, PLAIN)
                    sum_up = dot4((code_up << 1) & MASK, x, sum_up, PLAIN)
                else:
                    sum_gate = dot4((code_gate >> (p * BITS - 1)) & MASK, x, sum_gate, PLAIN)
                    sum_up = dot4((code_up >> (p * BITS - 1)) & MASK, x, sum_up, PLAIN)
            step = tl.load(scale + t * G + g, mask=in_q, other=0.0)[None, :]
            longer_gate += (gate[t] + sum_gate.to(tl.float32) * (scale_gate * step),)
            longer_up += (up[t] + sum_up.to(tl.float32) * (scale_up * step),)
        gate = longer_gate
        up = longer_up
    s = ()
    for t in tl.static_range(T):
        s += (tl.abs(value_and_slope(tl.sum(gate[t], 1) * 0.5, ACT)[0] * (tl.sum(up[t], 1) * 0.5)),)
    settle(s, tilt, coef, live, count, n, F, keep, slots, False, False, T, BANK, BB)
