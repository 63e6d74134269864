"""The arms of SMET's experiments: what each is, by name, as data.

`smet-25` is SMET at density 0.25; `set-25`, `rigl-25`, `static-25` and `reset-25` (SET with local clocks and ramp) are
the paper's controls at the same density; `small-25` is a dense model whose whole state has as many bytes as
`smet-25`'s. The rest vary one thing of `smet-25` or of the dense run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DENSITIES = {"50": 0.5, "25": 0.25, "10": 0.1}
EVERY = 25
"""Steps between topology updates; the paper's 100 would leave three in a run of 400 steps."""
_PLAIN = {"local_clock": False, "warmup_steps": 0, "lr_exponent": 0}
METHODS: dict[str, dict[str, Any]] = {
    "smet": {},
    "reset": {"lr_exponent": 0},
    "set": _PLAIN,
    "rigl": _PLAIN | {"growth": "gradient"},
    "static": {"update_every": 0, "lr_exponent": 0},
}
# (hidden, ffn, heads) whose whole dense state has at most the bytes of SMET's at that density; a test checks it
SMALLER = {"50": (156, 416, 3), "25": (138, 368, 3), "10": (124, 330, 2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One form of training."""

    name: str
    smet: dict[str, Any] | None = None
    """Settings of `fallow.SMET`; None trains dense."""
    widths: dict[str, int] = field(default_factory=dict)
    """What differs in the architecture."""
    lr_scale: float = 1.0
    steps_scale: float = 1.0


def _small(percent: str) -> Arm:
    hidden, ffn, heads = SMALLER[percent]
    widths = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    return Arm(name=f"small-{percent}", widths=widths)


def _sparse(name: str, percent: str, **settings: Any) -> Arm:
    return Arm(name=name, smet={"density": DENSITIES[percent], "update_every": EVERY} | settings)


MAIN = [
    Arm(name="dense"),
    *(_sparse(f"{m}-{p}", p, **s) for p in ("25", "50", "10") for m, s in METHODS.items()),
    *(_small(p) for p in DENSITIES),
]
"""The table of the paper, and smaller dense models."""

ABLATIONS = [
    *(_sparse(f"smet-{p}-lr1", p, lr_exponent=1) for p in DENSITIES),
    _sparse("smet-25-w100", "25", warmup_steps=100),
    _sparse("smet-25-w0", "25", warmup_steps=0),
    _sparse("smet-25-unstructured", "25", structure="unstructured"),
    _sparse("smet-10-unstructured", "10", structure="unstructured"),
    _sparse("smet-25-erk", "25", distribution="erk"),
    _sparse("smet-25-cosine", "25", fraction_schedule="cosine"),
    _sparse("smet-25-stop75", "25", stop_at=0.75),
    _sparse("smet-25-every100", "25", update_every=100),
    _sparse("smet-25-gradient", "25", growth="gradient"),
    _sparse("smet-25-bf16state", "25", state_dtype="bf16"),
    _sparse("static-25-lr", "25", update_every=0, lr_exponent=0.5),
    _sparse("static-10-lr", "10", update_every=0, lr_exponent=0.5),
    _sparse("static-50-lr", "50", update_every=0, lr_exponent=0.5),
    Arm(name="dense-080", steps_scale=0.8),
    Arm(name="dense-125", steps_scale=1.25),
]
"""One thing changed at a time, and dense runs of other lengths for the comparison at equal seconds."""

SWEEP = [Arm(name=f"dense-lr{s:g}", lr_scale=s) for s in (0.5, 2.0)]
"""Dense at other learning rates; the recipe's is the best of them."""

ARMS = {arm.name: arm for arm in (*MAIN, *ABLATIONS, *SWEEP)}
SETS = {"main": MAIN, "ablations": ABLATIONS, "sweep": SWEEP}
