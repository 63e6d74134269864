"""The native rounding of training equals the packed copies that serve, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fallow.ops import bank_ffn
from fallow.ops.bank_ffn import cpu, pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("channels", "width", "group"), [(32, 64, 64), (48, 80, 32), (3, 33, 16), (16, 200, 64)])
def test_native_rounding_is_pytorchs(channels, width, group, bits, dtype):
    if not cpu.available()[0]:
        pytest.skip(cpu.available()[1])
    w = torch.randn(channels, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    w[0, :16] = 0
    found = cpu.rounded(w, bits=bits, group=group)
    assert torch.equal(found, pack.rounded(w, bits=bits, group=group))
    assert torch.equal(bank_ffn.rounded(w, bits=bits, group=group), found)
    codes, scales = bank_ffn.pack_quantized(w, w, bits=bits, group=group)
    gate, _ = bank_ffn.unpack_quantized(codes, scales)
    assert torch.equal(gate[:channels, :width].to(dtype), found)
