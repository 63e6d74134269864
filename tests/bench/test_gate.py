"""The correctness gate of the benchmarks: green on what runs here, red on a backend that is wrong."""

from __future__ import annotations

import pytest
import torch

from fallow.bench import gate
from fallow.errors import GateError
from fallow.ops.attention import cpu as attention_cpu
from fallow.ops.subset_ffn import cpu as ffn_cpu
from fallow.ops.subset_linear import cpu as linear_cpu


def test_every_op_of_a_step_is_within_its_tolerance() -> None:
    errors = gate.check_all()
    assert {name.split("/")[0] for name in errors} == {"subset_ffn", "subset_linear", "attention"}
    assert all(error < (1e-5 if name.endswith("float32") else 2e-2) for name, error in errors.items())


@pytest.mark.parametrize(
    ("module", "function", "check"),
    [
        (ffn_cpu, "subset_ffn", gate.check_subset_ffn),
        (linear_cpu, "subset_linear", gate.check_subset_linear),
        (attention_cpu, "attention", gate.check_attention),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_a_wrong_backend_is_named(monkeypatch, module, function, check, wrong) -> None:
    right = getattr(module, function)

    def broken(x, *args, **kwargs):
        if wrong == "gradient":
            x = x.detach() + 1.1 * (x - x.detach())
        y = right(x, *args, **kwargs)
        return y if wrong == "gradient" else y * (1.1 if wrong == "value" else torch.nan)

    monkeypatch.setattr(module, function, broken)
    with pytest.raises(GateError, match=rf"{function}/cpu: (y|d\w+) differs from naive by .* no speed is reported"):
        check()
