"""The three predictors: which channels of an FFN will matter for a token, from its input alone.

    linear     s = U (V x)                               a logit; the paper's
    bilinear   s = |act(U_g (V_g x)) · (U_u (V_u x))|    ours: |h| is even in the up projection, no linear map ranks it
    quantized  s = |act(Ŵ_g x) · (Ŵ_u x)|                ours: Ŵ in 2 or 4 bits; no parameters of its own

`tilt_F` is added to logits and multiplies magnitudes: there it starts as the norm of the channel's down column where
the criterion is the contribution. Parameters are the method's, outside of the stock model, fp32, and used in the dtype
of x. Starts need no training: `low_rank` is the best rank-R copy of a matrix for inputs like those seen.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from fallow.anatomy.ffn import FFNWeights
from fallow.errors import ConfigError
from fallow.methods.ranks import several
from fallow.methods.upcycle.compensation import Compensation
from fallow.methods.upcycle.config import Upcycle
from fallow.methods.upcycle.lowrank import gram, low_rank
from fallow.ops import bank_ffn
from fallow.ops.activation import activation
from fallow.shards import local

_TINY = 1e-20


class Predictor(nn.Module):
    """One layer's. Attributes: `kind`; `tilt_F` fp32 [F]; `started`, whether its start has been made; `compensation`,
    what stands in for the channels that it leaves out, or None."""

    kind: Literal["linear", "bilinear", "quantized"]
    tilt_F: Tensor

    def __init__(self, config: Upcycle, *, width: int, channels: int, act: str, device: torch.device) -> None:
        super().__init__()
        self.config, self.act, self.started = config, act, False
        neutral = torch.zeros if self.kind == "linear" else torch.ones
        self.register_buffer("tilt_F", neutral(channels, device=device))
        rank = config.compensation
        self.compensation = Compensation(rank=rank, width=width, device=device) if rank else None

    def start(self, w: FFNWeights, x_TD: Tensor | None) -> None:
        """Begin from the weights, and from inputs of the FFN where there are some."""
        if self.kind != "linear" and self.config.criterion == "contribution":
            self.tilt_F.copy_(down_norms(w))
        self._start(w, x_TD)
        self.started = True

    def _start(self, w: FFNWeights, x_TD: Tensor | None) -> None:
        raise NotImplementedError

    def scoring(self) -> list[nn.Parameter]:
        """The parameters that scores depend on."""
        return [p for name, p in self.named_parameters() if not name.startswith("compensation.")]

    def logits(self, x_TD: Tensor, w: FFNWeights) -> Tensor:
        """[T, F] whose order within a bank is the choice; of magnitudes the logarithm. Gradients reach parameters."""
        raise NotImplementedError

    def stale(self) -> None:
        """The weights have changed: forget what was derived from them."""

    def packed(self, w: FFNWeights) -> bank_ffn.Predictor:
        """As the op `bank_ffn` takes it."""
        raise NotImplementedError


class Linear(Predictor):
    kind = "linear"

    def __init__(self, config: Upcycle, *, width: int, channels: int, act: str, device: torch.device) -> None:
        super().__init__(config, width=width, channels=channels, act=act, device=device)
        rank = rank_of(config, width)
        self.v_RD = nn.Parameter(torch.zeros(rank, width, device=device))
        self.u_FR = nn.Parameter(torch.zeros(channels, rank, device=device))

    @torch.no_grad()
    def _start(self, w: FFNWeights, x_TD: Tensor | None) -> None:
        """From inputs: least squares of each channel's logarithm against its bank's mean. Else the gate's own rows."""
        target_FD, gram_DD = cast(Tensor, w.w_gate_FD).float(), None
        if x_TD is not None:
            gram_DD = gram(x_TD)
            wanted_TF = target_logits(contribution(x_TD, w, self.act, self.config), self.config.bank)
            moment_DF = x_TD.float().t() @ wanted_TF / x_TD.shape[0]
            target_FD = torch.linalg.solve(gram_DD, moment_DF).t()
        v, u = low_rank(target_FD, gram_DD, self.v_RD.shape[0])
        self.v_RD.copy_(v)
        self.u_FR.copy_(u)

    def logits(self, x_TD: Tensor, w: FFNWeights) -> Tensor:
        z_TR = nn.functional.linear(x_TD, self.v_RD.to(x_TD.dtype))
        return nn.functional.linear(z_TR, self.u_FR.to(x_TD.dtype)) + self.tilt_F

    def packed(self, w: FFNWeights) -> bank_ffn.Predictor:
        gate: Literal["one", "smooth"] = "smooth" if self.config.gate == "smooth" else "one"
        return _served("linear", (self.v_RD, self.u_FR), self.tilt_F, gate, w.w_up_FD.dtype)


class Bilinear(Predictor):
    kind = "bilinear"

    def __init__(self, config: Upcycle, *, width: int, channels: int, act: str, device: torch.device) -> None:
        super().__init__(config, width=width, channels=channels, act=act, device=device)
        rank = rank_of(config, width)
        for name in ("gate", "up"):
            setattr(self, f"v_{name}_RD", nn.Parameter(torch.zeros(rank, width, device=device)))
            setattr(self, f"u_{name}_FR", nn.Parameter(torch.zeros(channels, rank, device=device)))

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """V and U of the gate, V and U of the up projection."""
        names = ("v_gate_RD", "u_gate_FR", "v_up_RD", "u_up_FR")
        return cast(tuple[Tensor, Tensor, Tensor, Tensor], tuple(getattr(self, n) for n in names))

    @torch.no_grad()
    def _start(self, w: FFNWeights, x_TD: Tensor | None) -> None:
        gram_DD = None if x_TD is None else gram(x_TD)
        v_gate, u_gate, v_up, u_up = self.factors()
        for matrix, v, u in ((w.w_gate_FD, v_gate, u_gate), (w.w_up_FD, v_up, u_up)):
            found = low_rank(cast(Tensor, matrix).float(), gram_DD, v.shape[0])
            v.copy_(found[0])
            u.copy_(found[1])

    def logits(self, x_TD: Tensor, w: FFNWeights) -> Tensor:
        v_gate, u_gate, v_up, u_up = (f.to(x_TD.dtype) for f in self.factors())
        linear = nn.functional.linear
        return _log(linear(linear(x_TD, v_gate), u_gate), linear(linear(x_TD, v_up), u_up), self)

    def packed(self, w: FFNWeights) -> bank_ffn.Predictor:
        return _served("bilinear", self.factors(), self.tilt_F, "one", w.w_up_FD.dtype)


class Quantized(Predictor):
    kind = "quantized"
    _copies: tuple[Tensor, Tensor] | None = None

    def _start(self, w: FFNWeights, x_TD: Tensor | None) -> None:
        """Its copies are made of the weights when they are needed."""

    def stale(self) -> None:
        self._copies = None

    @torch.no_grad()
    def logits(self, x_TD: Tensor, w: FFNWeights) -> Tensor:
        """Magnitudes themselves: nothing learns from them, and they are in the order of their logarithms."""
        gate, up = self._copies or self._rounded(w)
        if self._copies is None and not several():  # under FSDP2 they would be whole weights on every rank
            self._copies = gate, up
        linear = nn.functional.linear
        size_TF = (activation(linear(x_TD, gate), self.act) * linear(x_TD, up)).abs_()
        return size_TF * self.tilt_F

    def _rounded(self, w: FFNWeights) -> tuple[Tensor, Tensor]:
        """Gate and up as their copies hold them, in the dtype of the weights."""
        bits, group = self.config.bits, self.config.group
        gate, up = cast(Tensor, w.w_gate_FD).detach(), w.w_up_FD.detach()
        return bank_ffn.rounded(gate, bits=bits, group=group), bank_ffn.rounded(up, bits=bits, group=group)

    def packed(self, w: FFNWeights) -> bank_ffn.Predictor:
        codes = bank_ffn.pack_quantized(
            cast(Tensor, w.w_gate_FD).detach(), w.w_up_FD.detach(), bits=self.config.bits, group=self.config.group
        )
        return bank_ffn.Predictor("quantized", tuple(codes), self.tilt_F, "one")


KINDS: dict[str, type[Predictor]] = {"linear": Linear, "bilinear": Bilinear, "quantized": Quantized}


def _served(
    kind: Literal["linear", "bilinear"],
    factors: tuple[Tensor, ...],
    tilt_F: Tensor,
    gate: Literal["one", "smooth"],
    dtype: torch.dtype,
) -> bank_ffn.Predictor:
    """In bf16 models as int8 rows, half the bytes (mean recall on SmolLM2 moves by 0.0001), else in that dtype."""
    found = bank_ffn.Predictor(kind, tuple(f.detach().to(dtype) for f in factors), tilt_F, gate)
    return bank_ffn.pack_factors(found) if dtype == torch.bfloat16 else found


def _log(gate_TF: Tensor, up_TF: Tensor, predictor: Predictor) -> Tensor:
    """Logarithm of |act(gate) · up| · tilt."""
    magnitude_TF = (activation(gate_TF, predictor.act) * up_TF).abs().float() * predictor.tilt_F
    return (magnitude_TF + _TINY).log()


def rank_of(config: Upcycle, width: int) -> int:
    """The inner width asked for, or in multiples of 16 what `rank` says of None. Raises ConfigError: not below D."""
    share = 14 if config.predictor == "linear" else 9
    rank = config.rank or max(16, round(width / share / 16) * 16)
    if rank >= width and config.rank:
        raise ConfigError(f"Upcycle: rank={rank} must be below the model's width, {width}")
    return min(rank, width)


def down_norms(w: FFNWeights) -> Tensor:
    """fp32 [F], norms of the columns of the down projection."""
    return local(w.w_down_DF.detach()).float().norm(dim=0)


@torch.no_grad()
def contribution(x_TD: Tensor, w: FFNWeights, act: str, config: Upcycle) -> Tensor:
    """fp32 [T, F]: by what channels are judged, from dense gate and up."""
    linear = nn.functional.linear
    gate_TF, up_TF = linear(x_TD, cast(Tensor, w.w_gate_FD), w.b_gate_F), linear(x_TD, w.w_up_FD, w.b_up_F)
    return judged(activation(gate_TF, act) * up_TF, w, config)


def judged(h_TF: Tensor, w: FFNWeights, config: Upcycle) -> Tensor:
    """fp32 [T, F]: the criterion of hidden activations."""
    size_TF = h_TF.detach().abs().float()
    return size_TF * down_norms(w) if config.criterion == "contribution" else size_TF


def target_logits(contribution_TF: Tensor, bank: int) -> Tensor:
    """fp32 [T, F]: logarithm of each channel's contribution, less its bank's mean."""
    banked_TNb = (contribution_TF + contribution_TF.mean() * 1e-3 + _TINY).log().unflatten(1, (-1, bank))
    return (banked_TNb - banked_TNb.mean(2, keepdim=True)).flatten(1)
