"""`bank_mask`: exactly `keep` of every bank, ties to the lower index, NaN last, the same bits from every instruction
set as from the stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import BackendError, ConfigError
from fallow.ops.bank_ffn import bank_mask, cpu, naive

LEVELS = (0, 1, 2, 3)  # plain C++, AVX2, AVX-512, AVX-512 with VNNI; those the CPU lacks fall back to what it has
native = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])


def brute_force(scores_TF: torch.Tensor, bank: int, keep: int) -> torch.Tensor:
    """By the definition, in Python."""
    mask_TF = torch.zeros(scores_TF.shape, dtype=torch.bool)
    for t, row in enumerate(scores_TF.tolist()):
        for begin in range(0, len(row), bank):
            of = row[begin : begin + bank]
            size = [float("-inf") if s != s else s for s in of]
            for i in sorted(range(bank), key=lambda i: (-size[i], i))[:keep]:
                mask_TF[t, begin + i] = True
    return mask_TF


KINDS = {
    "normal": lambda g, *s: torch.randn(*s, generator=g),
    "few values": lambda g, *s: torch.randint(-2, 3, s, generator=g).float(),
    "all equal": lambda g, *s: torch.full(s, 1.5),
    "zeros of both signs": lambda g, *s: torch.where(torch.rand(*s, generator=g) < 0.5, 0.0, -0.0),
    "wide": lambda g, *s: torch.randn(*s, generator=g) * 10.0 ** torch.randint(-40, 38, s, generator=g),
    "with NaN": lambda g, *s: torch.where(torch.rand(*s, generator=g) < 0.4, torch.nan, torch.randn(*s, generator=g)),
    "all NaN": lambda g, *s: torch.full(s, torch.nan),
    "with infinities": lambda g, *s: (
        torch.randn(*s, generator=g).masked_fill(torch.rand(*s, generator=g) < 0.5, torch.inf)
        * torch.randint(0, 2, s, generator=g).mul(2).sub(1)
    ),
}


@pytest.mark.parametrize("bank", [1, 2, 16, 24, 32, 64, 100, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_matches_the_definition(kind, bank):
    g = torch.Generator().manual_seed(1)
    scores_TF = KINDS[kind](g, 3, 5 * bank)
    for keep in sorted({1, 2, max(1, bank // 4), bank - 1, bank} & set(range(1, bank + 1))):
        want_TF = brute_force(scores_TF, bank, keep)
        assert torch.equal(naive.bank_mask(scores_TF, bank=bank, keep=keep), want_TF)
        for level in LEVELS if cpu.available()[0] else ():
            got_TF = cpu.bank_mask(scores_TF, bank=bank, keep=keep, level=level)
            assert torch.equal(got_TF, want_TF), f"keep {keep}, level {level}"


@native
@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(0, 9),
    banks=st.integers(1, 9),
    bank=st.integers(1, 150),
    share=st.floats(0, 1),
    bf16=st.booleans(),
    kind=st.sampled_from(sorted(KINDS)),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 99),
)
def test_any_shape(tokens, banks, bank, share, bf16, kind, level, seed):
    keep = max(1, round(share * bank))
    scores_TF = KINDS[kind](torch.Generator().manual_seed(seed), tokens, banks * bank)
    scores_TF = scores_TF.bfloat16() if bf16 else scores_TF
    got_TF = cpu.bank_mask(scores_TF, bank=bank, keep=keep, level=level)
    assert torch.equal(got_TF, naive.bank_mask(scores_TF, bank=bank, keep=keep))


@native
def test_threads_share_the_banks(monkeypatch):
    monkeypatch.setattr(cpu, "_MASK_ALONE", 0)
    scores_TF = torch.randn(70, 640, generator=torch.Generator().manual_seed(2))
    want_TF, before = naive.bank_mask(scores_TF, bank=64, keep=16), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.bank_mask(scores_TF, bank=64, keep=16), want_TF)
    finally:
        torch.set_num_threads(before)


def test_any_strides_and_other_dtypes():
    scores_FT = torch.randn(96, 5, generator=torch.Generator().manual_seed(3))
    want = naive.bank_mask(scores_FT.t().contiguous(), bank=32, keep=9)
    assert torch.equal(bank_mask(scores_FT.t(), bank=32, keep=9), want)
    assert torch.equal(bank_mask(scores_FT.t().double(), bank=32, keep=9), want)


@pytest.mark.parametrize(
    ("bank", "keep", "match"),
    [
        (60, 16, "96 channels are no whole number of banks of 60"),
        (0, 1, "banks of 0"),
        (32, 33, "keep=33 of bank=32"),
        (32, 0, "keep must be 1 to 32"),
    ],
)
def test_bad_input_says_what_to_do(bank, keep, match):
    with pytest.raises(ConfigError, match=match):
        bank_mask(torch.zeros(2, 96), bank=bank, keep=keep)


@native
def test_backend_that_cannot_run():
    with pytest.raises(BackendError, match="float64"):
        bank_mask(torch.zeros(2, 96).double(), bank=32, keep=3, backend="cpu")
    with pytest.raises(BackendError, match="no backend 'gpu'"):
        bank_mask(torch.zeros(2, 96), bank=32, keep=3, backend="gpu")
