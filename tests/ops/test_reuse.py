"""A reused buffer is never handed to two holders at once."""

from __future__ import annotations

import torch

from fallow.ops import reuse


def test_same_memory_when_free_and_other_memory_when_held():
    x = torch.zeros(50, 30)
    first = reuse.empty_like(x, "test")
    address = first.data_ptr()
    second = reuse.empty_like(x, "test")
    assert second.data_ptr() != address, "the first is still held"
    address = second.data_ptr()
    del second
    third = reuse.empty_like(x[:10], "test")
    assert third.data_ptr() == address
    assert third.shape == (10, 30)
    view = third[2:]
    del third
    assert reuse.empty_like(x, "test").data_ptr() != address, "a view holds it"
    del view
