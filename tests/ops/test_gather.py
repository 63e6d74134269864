"""Rows and columns by index: the compiled kernels and torch's own operators equal plain indexing, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fallow.ops import gather, native


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(gather, "_library", lambda: None)
    elif not native.available()[0]:
        pytest.skip(native.available()[1])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (37, 19, 11), (64, 33, 64)])
def test_gather_and_spread(dtype, threads, n, m, k, monkeypatch):
    monkeypatch.setattr(gather, "_threads", lambda nbytes: threads)
    w = torch.randn(n, m, generator=torch.Generator().manual_seed(0)).to(dtype)
    idx = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:k].sort().values
    nan = float("nan")
    assert torch.equal(gather.gather_rows(w, idx, torch.full((k, m), nan, dtype=dtype)), w[idx])
    columns = w.t().contiguous()
    assert torch.equal(gather.gather_cols(columns, idx, torch.full((m, k), nan, dtype=dtype)), columns[:, idx])
    wide = torch.cat([columns, columns + 1], 1)[:, :n]
    assert torch.equal(gather.gather_cols(wide, idx, torch.full((m, k), nan, dtype=dtype)), columns[:, idx])
    want = torch.zeros_like(w)
    want[idx] = w[idx]
    assert torch.equal(gather.spread_rows(w[idx], idx, n), want)
    assert torch.equal(gather.spread_cols(w[idx].t().contiguous(), idx, n), want.t())
