"""`bank_ffn` around its kernel: the naive form by its definition, packing, layouts, compiled graphs, child processes,
and what is refused."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from tests.ops.test_bank_ffn import KINDS, TOLERANCE, assert_right, make, native, run_cpu

from fallow.errors import BackendError, ConfigError
from fallow.ops import bank_ffn as op
from fallow.ops.bank_ffn import Predictor, bank_ffn, cpu, naive


def test_naive_is_the_definition():
    """By hand, one token and one bank at a time."""
    x, p, (gate, up, down) = make(2, 24, 64, kind="linear", gate="smooth")
    y = bank_ffn(x, p, gate, up, down, act="gelu", bank=32, keep=3, backend="naive")
    V, U = p.tensors
    want = torch.zeros_like(x)
    for t in range(2):
        s_F = U @ (V @ x[t]) + p.tilt_F
        for begin in (0, 32):
            for f in (begin + s_F[begin : begin + 32].topk(3).indices).tolist():
                want[t] += 2 * s_F[f].sigmoid() * F.gelu(gate[f] @ x[t]) * (up[f] @ x[t]) * down[f]
    torch.testing.assert_close(y, want)
    assert op.last_used == "naive"


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("channels", "D", "group"), [(64, 128, 64), (70, 50, 32), (16, 16, 16), (33, 200, 64)])
def test_packed_copies_hold_what_rounded_says(bits, channels, D, group):
    g = torch.Generator().manual_seed(0)
    full = torch.randn(2, channels, D, generator=g)
    full[0, 3] = 0
    got = op.unpack_quantized(*op.pack_quantized(*full, bits=bits, group=group))
    for w, back in zip(full, got, strict=True):
        assert torch.equal(back[:channels, :D], op.rounded(w, bits=bits, group=group))
        step = w.abs().max() / ((2**bits - 1) / 2)
        assert (back[:channels, :D] - w).abs().max() <= step * 0.52, "half a step, and what a bf16 scale cuts off"
    assert (got[0][3] == 0).all()


def test_int8_factors_find_nearly_the_same_channels():
    x, p, _ = make(64, 96, 512, 48, kind="bilinear")
    one, other = (naive.bank_mask(naive.scores(x, q, "silu"), bank=64, keep=16) for q in (p, op.pack_factors(p)))
    assert (one & other).sum() / one.sum() > 0.98


def test_channel_contiguous():
    w = torch.nn.Parameter(torch.randn(24, 64))
    before = w.detach().clone()
    op.channel_contiguous_(w)
    assert torch.equal(w, before) and w.t().is_contiguous() and w.shape == (24, 64) and w.is_leaf
    address = w.data_ptr()
    op.channel_contiguous_(w)
    assert w.data_ptr() == address


def test_side_by_side_in_place():
    g = torch.Generator().manual_seed(0)
    gate, up, down = (torch.nn.Parameter(torch.randn(*s, generator=g)) for s in ((64, 24), (64, 24), (24, 64)))
    before = [w.detach().clone() for w in (gate, up, down)]
    op.side_by_side_(gate, up, down)
    for w, b in zip((gate, up, down), before, strict=True):
        assert torch.equal(w, b) and w.is_leaf and w.requires_grad
    address = gate.data_ptr()
    assert [t.data_ptr() - address for t in (up, down)] == [4 * 24, 4 * 48]
    assert gate.stride() == up.stride() == down.t().stride() == (72, 1)
    op.side_by_side_(gate, up, down)
    assert gate.data_ptr() == address, "already so"


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_side_by_side_gives_the_same_bits(dtype):
    x, p, weights = make(3, 40, 192, dtype=dtype)
    views = op.side_by_side(*weights)
    assert op.tensor_of(views[0]).stride() == (120, 1)
    assert torch.equal(run_cpu(x, p, list(views)), run_cpu(x, p, weights))


@native
def test_leading_dimensions_and_strides():
    x, p, weights = make(6, 40, 128, dtype=torch.bfloat16)
    y = bank_ffn(x, p, *weights, act="silu", bank=64, keep=16)
    assert op.last_used == "cpu", "the backend chosen without being named"
    assert torch.equal(bank_ffn(x.view(2, 3, 40), p, *weights, act="silu", bank=64, keep=16), y.view(2, 3, 40))
    turned = [w.t().contiguous().t() for w in weights]
    across = x.t().contiguous().t()
    assert torch.equal(bank_ffn(across, p, *turned, act="silu", bank=64, keep=16), y)


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", ["bilinear", "quantized4"])
def test_compiles_without_a_break(kind, dtype):
    x, p, weights = make(2, 32, 128, kind=kind, dtype=dtype)

    def call(x):
        return bank_ffn(x, p, *weights, act="silu", bank=64, keep=16) * 1

    with torch.no_grad():
        got = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(got, call(x))


@native
def test_registration_is_sound():
    x, p, weights = make(2, 32, 128)
    arguments = (x, p.kind, list(p.tensors), p.tilt_F, p.gate, [], weights, "silu", 64, 16, "cpu")
    torch.library.opcheck(op.op.forward, arguments, test_utils=("test_schema", "test_faketensor"))


@native
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_runs_in_a_child_process(method):
    """A forked child has none of its parent's threads."""
    torch.set_num_threads(2)
    try:
        x, p, weights = make(1, 32, 128)
        want = run_cpu(x, p, weights)
        context = multiprocessing.get_context(method)
        with context.Pool(1) as pool:
            got = pool.apply_async(_in_child, ()).get(timeout=120)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.tensor(got), want)


def _in_child() -> list[list[float]]:
    torch.set_num_threads(2)
    x, p, weights = make(1, 32, 128)
    return run_cpu(x, p, weights).tolist()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"act": "tanh"}, "act='tanh' is not one of silu"),
        ({"bank": 60}, "192 channels are no whole number of banks of 60"),
        ({"keep": 65}, "keep=65 of bank=64"),
        ({"keep": 0}, "keep must be 1 to 64"),
        ({"down": torch.zeros(40, 192)}, "pass the down projection transposed"),
        ({"x": torch.zeros(3, 41)}, "shapes do not fit"),
        ({"x": torch.zeros(3, 40).bfloat16()}, "the dtype of x, or all be Int8Rows"),
        ({"kind": "cubic"}, "predictor kind 'cubic' is not one of linear"),
        ({"gate": "soft"}, "gate 'soft' is not one of one, smooth"),
        ({"kind": "bilinear"}, "does not fit width 40 and 192 channels"),
        ({"tensors": (torch.zeros(8, 40), torch.zeros(190, 8))}, "make it from this layer's weights"),
        ({"tilt": torch.zeros(3)}, "192 channels need"),
    ],
)
def test_bad_input_says_what_to_do(change, match):
    x, p, (gate, up, down) = make()
    p = p._replace(**{n: change[n] for n in ("kind", "gate", "tensors") if n in change})
    p = p._replace(tilt_F=change.get("tilt", p.tilt_F))
    options = {"act": "silu", "bank": 64, "keep": 16} | {n: change[n] for n in ("act", "bank", "keep") if n in change}
    with pytest.raises(ConfigError, match=match):
        bank_ffn(change.get("x", x), p, gate, up, change.get("down", down), **options)


def test_smooth_needs_logits():
    x, p, weights = make(kind="bilinear", gate="smooth")
    with pytest.raises(ConfigError, match="'smooth' needs logits"):
        bank_ffn(x, p, *weights, act="silu", bank=64, keep=16)


@pytest.mark.parametrize("which", ["x", "weight", "factor"])
def test_gradients_are_refused(which):
    x, p, weights = make()
    {"x": x, "weight": weights[1], "factor": p.tensors[0]}[which].requires_grad_()
    with pytest.raises(ConfigError, match=r"torch\.no_grad"):
        bank_ffn(x, p, *weights, act="silu", bank=64, keep=16)
    with torch.no_grad():
        bank_ffn(x, p, *weights, act="silu", bank=64, keep=16)


def test_wrong_bits_and_groups():
    w = torch.zeros(16, 32)
    with pytest.raises(ConfigError, match="2 or 4 bits"):
        op.pack_quantized(w, w, bits=3)
    with pytest.raises(ConfigError, match="multiple of 16"):
        op.pack_quantized(w, w, group=20)
    with pytest.raises(ConfigError, match="no factors"):
        op.pack_factors(Predictor("scores", (w,)))


@native
def test_backend_that_cannot_run():
    x, p, weights = make(17)
    with pytest.raises(BackendError, match="17 tokens; up to 16"):
        bank_ffn(x, p, *weights, act="silu", bank=64, keep=16, backend="cpu")
    with pytest.raises(BackendError, match="no backend 'gpu'"):
        bank_ffn(x, p, *weights, act="silu", bank=64, keep=16, backend="gpu")


def test_bytes_and_break_even():
    _, linear, weights = make(1, 64, 640, 8, dtype=torch.bfloat16)
    up = weights[1]
    dense = 3 * 640 * 64 * 2
    assert op.dense_bytes(up) == dense
    own = sum(t.nbytes for t in linear.tensors)
    assert op.bytes_read(linear, up, bank=64, keep=16) == dense / 4 + own
    assert op.bytes_read(linear, up, bank=64, keep=16, tokens=2) == dense * 7 / 16 + own
    assert op.break_even(linear, up, bank=64, keep=16) == 8
    _, quantized, _ = make(1, 64, 640, kind="quantized4", dtype=torch.bfloat16)
    at = op.break_even(quantized, up, bank=64, keep=16)
    of = [op.bytes_read(quantized, up, bank=64, keep=16, tokens=t) < dense for t in range(1, 9)]
    assert of == [t <= at for t in range(1, 9)] and 1 < at < 8
    assert op.break_even(quantized, up, bank=64, keep=60) == 0
    int8 = op.int8_rows(up)
    assert op.dense_bytes(int8) == 3 * (640 * 64 + 4 * 640)


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_tokens_take_dense_gemms_and_the_same_mask(kind, dtype):
    x, p, weights = make(300 if dtype == torch.int8 else 20, 72, 192, kind=kind, dtype=dtype)
    y = bank_ffn(x, p, *weights, act="silu", bank=64, keep=16)
    assert op.last_used == "dense"
    first = slice(0, 8)
    few = p._replace(tensors=(p.tensors[0][first],)) if kind == "scores" else p
    want = run_cpu(x[first], few, weights)
    assert (y[first].float() - want.float()).norm() <= 4 * TOLERANCE[dtype] * want.float().norm()
    if dtype == torch.float32:
        assert_right(y, x, p, weights, act="silu", bank=64, keep=16, dtype=dtype)


@native
@pytest.mark.parametrize("kind", KINDS)
def test_more_than_eight_tokens_by_eights(kind):
    x, p, weights = make(13, 40, 192, kind=kind, dtype=torch.int8)
    y = bank_ffn(x, p, *weights, act="silu", bank=64, keep=16)
    assert op.last_used == "cpu"
    for some in (slice(0, 8), slice(8, 13)):
        own = p._replace(tensors=(p.tensors[0][some],)) if kind == "scores" else p
        assert torch.equal(y[some], run_cpu(x[some], own, weights))


@native
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_any_number_of_tokens(kind, level):
    for T, channels in ((1, 200), (65, 72)):
        x, p, weights = make(T, 50, channels, kind=kind)
        got = cpu.scores(x, p, weights[1], act="gelu", level=level)
        want = naive.scores(x, p, "gelu")[:, :channels]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
