"""What an upcycled run wrote about itself (`insight`, `method`, lines of its first stage) -> tidy numbers.

A run that was killed in its first stage has nothing but those lines; one that never looked has no recall. Each thing
missing leaves out what depends on it and nothing else. Bytes are counted from shapes as the kernels read them: of gate,
up and down the rows of living channels, and all of the predictor. Cost: one pass over the block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fallow.report.insight_data import Rows, counted, mean
from fallow.report.loading import SERVED_SPARSE, Run, lookup, number

Layers = list[tuple[int, float]]
"""`(number of the layer, from 1, its value)`; layers without a number are left out."""
CONTROLS = {
    "random": "by chance",
    "oracle": "by what each turns out to be worth, which takes computing all of them",
    "threshold": "wherever they exceed a threshold, however many that are",
}
"""Who chooses where it is not a predictor: nothing serves these."""
_SCALE_BYTES, _ROW_SCALE_BYTES, _TILT_BYTES = 2, 4, 4


@dataclass(kw_only=True, slots=True)
class Upcycled:
    """One run's."""

    settings: dict[str, Any]
    """Of the method."""
    bank: float | None
    keep: list[float]
    """Channels of a bank that live, by layer."""
    width: float | None
    channels: float | None
    weight_bytes: int
    """Of one weight, in the run's precision."""
    dtype: str
    looks: list[dict[str, Any]] = field(default_factory=list)
    """With a step each, ascending."""
    fits: list[dict[str, Any]] = field(default_factory=list)
    """Records of the first stage, with tokens each, ascending."""

    @property
    def selection(self) -> str:
        return str(self.settings.get("selection") or "predictor")

    @property
    def kind(self) -> str:
        """Of the predictor."""
        return str(self.settings.get("predictor") or "")

    @property
    def rank(self) -> float | None:
        """Inner width of a linear or bilinear predictor; of None what the method takes for it."""
        rank = number(self.settings, "rank")
        if rank is not None or self.width is None:
            return rank
        share = 14 if self.kind == "linear" else 9
        return min(max(16, round(self.width / share / 16) * 16), self.width)

    @property
    def living(self) -> float | None:
        """Share of the FFNs' channels that a token computes."""
        chosen = self.by_layer(-1, "selected") if self.selection == "threshold" else []
        if chosen:
            return mean([value for _, value in chosen])
        return mean(self.keep) / self.bank if self.keep and self.bank else None

    @property
    def predictor(self) -> float | None:
        """Bytes of the predictor over those of gate, up and down; None where it is not known, or nothing serves it."""
        d, f = self.width, self.channels
        if not d or not f or self.selection != "predictor":
            return None
        rank, bits, group = self.rank, number(self.settings, "bits"), number(self.settings, "group")
        thin = None if rank is None else rank * (d + f) * self.weight_bytes
        if rank is not None and self.dtype == "bfloat16":
            thin = rank * (d + f) + _ROW_SCALE_BYTES * (rank + f)  # served as int8 rows
        copies = 2 * d * f * (bits / 8 + _SCALE_BYTES / group) if bits and group else None
        own = {"linear": thin, "bilinear": thin and 2 * thin, "quantized": copies}.get(self.kind)
        return None if own is None else (own + _TILT_BYTES * f) / (3 * d * f * self.weight_bytes)

    @property
    def compensation(self) -> float:
        """Bytes of what stands in for the dead channels over those of gate, up and down; 0: nothing does."""
        rank = number(self.settings, "compensation") or 0
        return (2 * rank + 1) / (3 * self.channels) if rank and self.channels else 0.0

    @property
    def reads(self) -> float | None:
        """Share of the FFNs' bytes that decoding one token reads, the predictor's and the compensation's added."""
        if self.living is None or self.predictor is None:
            return None
        return self.living + self.predictor + self.compensation

    @property
    def parts(self) -> str:
        """Of what `reads` consists."""
        stand_in = f", {self.compensation:.1%} compensation" if self.compensation else ""
        return f"{self.living or 0:.0%} living channels, {self.predictor or 0:.1%} predictor{stand_in}"

    @property
    def kept(self) -> str:
        """`16 of 64`, or the range over layers."""
        if not self.keep or not self.bank:
            return "some"
        low, high = min(self.keep), max(self.keep)
        return f"{low:.0f}{f' to {high:.0f}' if high > low else ''} of {self.bank:.0f}"

    @property
    def chooser(self) -> str:
        """What chooses the channels, in words that follow "chosen"."""
        if self.selection in CONTROLS:
            return CONTROLS[self.selection]
        rank = f", rank {self.rank:.0f}" if self.rank is not None else ""
        bits = number(self.settings, "bits")
        return {
            "quantized": f"by copies of its gate and up weights in {bits:.0f} bits" if bits else "by low-bit copies",
            "bilinear": f"by thin factors of its gate and up weights (bilinear{rank})",
            "linear": f"by two thin matrices (linear{rank})",
        }.get(self.kind, "by a predictor")

    def by_layer(self, which: int, name: str) -> Layers:
        """A measure at the first (0) or the last (-1) look that has it."""
        held = [look[name] for look in self.looks if isinstance(look.get(name), list)]
        values = held[which] if held else []
        return [(n, v) for n, value in enumerate(values, start=1) if (v := number({"v": value}, "v")) is not None]

    def looked(self, which: int, name: str) -> int | None:
        """The step of that look."""
        steps = [int(look["step"]) for look in self.looks if isinstance(look.get(name), list)]
        return steps[which] if steps else None

    def fitted(self, name: str) -> Rows:
        """A measure of the first stage: `(tokens, value of each layer)`."""
        rows = [(int(record["tokens"]), counted(record.get(name))) for record in self.fits]
        return [row for row in rows if row[1]]


def read(run: Run) -> Upcycled | None:
    """None where the run is of another method."""
    if run.method not in SERVED_SPARSE:
        return None
    settings = lookup(run.info, "method")
    block = lookup(run.info, "insight")
    layers = int(number(run.info, "model", "layers") or 1)
    keep = counted(lookup(block, "keep")) or counted(settings.get("keep"))
    dtype = str(lookup(run.info, "precision", "dtype") or "bfloat16")
    return Upcycled(
        settings=settings,
        bank=number(block, "bank") or number(settings, "bank"),
        keep=keep * layers if len(keep) == 1 else keep,
        width=number(run.info, "model", "d_model"),
        channels=number(run.info, "model", "ffn"),
        weight_bytes=4 if dtype == "float32" else 2,
        dtype=dtype,
        looks=_items(lookup(block, "looks"), "step"),
        fits=_items(lookup(block, "fits"), "tokens") or run.prepared,
    )


def _items(value: object, place: str) -> list[dict[str, Any]]:
    """Records in the order of `place`, the last of equal ones."""
    held = {number(i, place): i for i in value if number(i, place) is not None} if isinstance(value, list) else {}
    return [held[at] for at in sorted(at for at in held if at is not None)]
