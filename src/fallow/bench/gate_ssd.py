"""The correctness gate of `fallow bench ssd`: `expert_ffn` against the loop over experts, with a gate and without."""

from __future__ import annotations

from functools import partial

import torch

from fallow.bench.gate import DTYPES, _compare, _random
from fallow.ops import expert_ffn as op
from fallow.ops.activation import ACTIVATIONS
from fallow.ops.expert_ffn import expert_ffn


def check_expert_ffn(
    *, backend: str | None = None, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = DTYPES
) -> dict[str, float]:
    """Worst relative error per dtype of `backend` (default: the one that would run), in the value and in each gradient,
    that of the coefficients included. Raises GateError when one is too large."""
    g = torch.Generator().manual_seed(11)
    T, D, E, C, K = 77, 48, 6, 20, 2  # ragged on purpose
    score_TE = torch.rand(T, E, generator=g)
    score_TE[:, -1] = -1  # the last expert gets no token
    choice_TK = score_TE.topk(K, dim=1).indices.to(device)
    worst: dict[str, float] = {}
    for dtype in dtypes:
        for gate in ({"w_gate": (E * C, D)}, {}):
            named = _random({"x": (T, D), "w_up": (E * C, D), "w_down": (D, E * C)} | gate, dtype, device, g)
            named["coefficient"] = torch.ones(T, K, device=device)
            chosen = backend or op._choose(named["x"], None).name
            for act in ACTIVATIONS:

                def run(x, w_up, w_down, *rest, backend, act=act):
                    *w_gate, coefficient = rest
                    weights = (w_gate[0] if w_gate else None, w_up, w_down)
                    return expert_ffn(x, choice_TK, coefficient, *weights, act=act, experts=E, backend=backend)

                pair = partial(run, backend=chosen), partial(run, backend="naive")
                how = f"{act}, {'gated' if gate else 'two-matrix'}"
                _compare(f"expert_ffn/{chosen}", how, *pair, named, dtype, worst)
    return worst
