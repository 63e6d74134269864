"""`GatedFFN`: one FFN of the model, computed whole or by the channels that its predictor keeps in every bank.

It stands in the FFN's place and owns no weight of it. With gradients the GEMMs are dense and the mask is applied to
their result: what is trained is what will be served, and nothing is saved; a few tokens without gradients are the op
`bank_ffn`, which reads only the rows of living channels. Skipping work in training would need banks whose tokens agree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fallow import anatomy
from fallow.anatomy.ffn import FFNRows, FFNWeights
from fallow.errors import ConfigError, UnsupportedModelError
from fallow.method import Mode
from fallow.methods.upcycle.compensation import Moments
from fallow.methods.upcycle.config import Upcycle
from fallow.methods.upcycle.learning import gated, in_bank_cross_entropy
from fallow.methods.upcycle.predictors import KINDS, judged
from fallow.ops import bank_ffn
from fallow.ops.activation import activation
from fallow.ops.bank_ffn.select import tensor_of

ROWS = 2048
"""Tokens whose hidden activations are held at a time."""
Observer = Callable[["GatedFFN", Tensor], None]
"""Called in forward with (layer, x [T, D])."""


class GatedFFN:
    """One FFN. Attributes:

    view: where its weights are.
    bank, keep: channels of a bank and how many of them live; `keep` may be set at any time.
    predictor: scores channels.
    selection: who chooses.
    mode: "dense" or "sparse", what this layer computes where the method asks for sparse forwards.
    sparse: whether the method does; set by it.
    paired: whether the first half of a forward's rows is to be computed dense and the second sparse; set by it.
    learning: whether forward notes what `loss` adds up; set by the method in training.
    annealed: what the compensation, fitted to the final `keep`, is multiplied by while more channels live.
    threshold: fp32, channels judged above it live where selection is "threshold".
    """

    def __init__(self, view: anatomy.FFNView, config: Upcycle, *, number: int, keep: int) -> None:
        check(view, config)
        self.view, self.config, self.number = view, config, number
        self.bank, self.keep, self.selection = config.bank, keep, config.selection
        self.mode: Mode = "sparse"
        self.sparse = False
        self.paired = False
        self.learning = False
        self.observer: Observer | None = None
        self.heard: Callable[[Tensor], None] | None = None
        """Called with the output, as the hook of a module would be."""
        self.losses: list[Tensor] = []
        self.threshold = torch.zeros(())
        self.annealed = 1.0
        device = tensor_of(view.rows().w_up_FD).device
        self.chance = torch.Generator(device)
        self.predictor = KINDS[config.predictor](
            config, width=view.d_model, channels=view.n_channels, act=view.act, device=device
        )
        self._serving: bank_ffn.Predictor | None = None
        view.install(self.forward)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        if self.observer is not None:
            self.observer(self, x_TD)
        if not self.sparse or self.mode == "dense":
            y = self.view.dense(x)
        elif self.paired:
            with_all, with_few = x.chunk(2)
            y = torch.cat([self.view.dense(with_all), self._few(with_few)])
        else:
            y = self._few(x)
        if self.heard is not None:
            self.heard(y)
        return y

    def _few(self, x: Tensor) -> Tensor:
        """The output by the living channels, and what stands in for the others."""
        self.to(x.device)
        x_TD, rows = x.reshape(-1, x.shape[-1]), self.view.rows()
        if not self.predictor.started:
            self.predictor.start(self.view.weights(), None)
        if self._may_decode(x_TD, rows):
            return self._decode(x, rows)
        y = self._masked(x_TD, self.view.weights()).view(x.shape)
        if (stand_in := self.predictor.compensation) is not None:
            y = y + (stand_in(x) if self.annealed == 1.0 else self.annealed * stand_in(x))
        return y

    def _may_decode(self, x_TD: Tensor, rows: FFNRows) -> bool:
        return (
            not torch.is_grad_enabled()
            and self.selection == "predictor"
            and x_TD.shape[0] <= bank_ffn.MOST_TOKENS
            and rows.b_up_F is None
            and rows.b_gate_F is None
        )

    def _decode(self, x: Tensor, rows: FFNRows) -> Tensor:
        """Reads the living rows only. What is derived from the weights is made once and dropped by `stale`."""
        if self._serving is None:
            if isinstance(rows.w_down_FD, Tensor):
                self._lay_out()
                rows = self.view.rows()
            self._serving = self.predictor.packed(self.view.weights())
            if (stand_in := self.predictor.compensation) is not None:
                self._serving = self._serving._replace(compensation=stand_in.packed(x.dtype, self.annealed))
        assert rows.w_gate_FD is not None
        weights = (rows.w_gate_FD, rows.w_up_FD, rows.w_down_FD)
        y = bank_ffn.bank_ffn(x, self._serving, *weights, act=self.view.act, bank=self.bank, keep=self.keep)
        return y if rows.b_down_D is None else y + rows.b_down_D

    def _lay_out(self) -> None:
        """The weights as decoding reads them fastest: the three rows of a channel next to each other where the family
        has three parameters, else the down projection channel by channel."""
        parameters = [where.parameter for where in self.view.parameters_along_channels()]
        if len(parameters) == 3:
            bank_ffn.side_by_side_(*parameters)
        else:
            bank_ffn.channel_contiguous_(parameters[-1])

    def lay_back(self) -> None:
        """Undo what decoding did to the parameters' layout: each owns its storage again, as training expects."""
        self.stale()
        for where in self.view.parameters_along_channels():
            if not where.parameter.is_contiguous():
                where.parameter.data = where.parameter.data.contiguous()

    def stale(self) -> None:
        """The weights have changed, or will: what serving derived from them is dropped."""
        self._serving = None
        self.predictor.stale()
        if self.predictor.compensation is not None:
            self.predictor.compensation.stale()

    def _masked(self, x_TD: Tensor, w: FFNWeights) -> Tensor:
        """y [T, D] by dense GEMMs, with the dead channels set to zero between them."""
        h_TF = self.hidden(x_TD, w)
        coefficient_TF = self.coefficient(x_TD, h_TF, w)
        return nn.functional.linear(h_TF * coefficient_TF.to(h_TF.dtype), w.w_down_DF, w.b_down_D)

    def hidden(self, x_TD: Tensor, w: FFNWeights | None = None) -> Tensor:
        """[T, F]: what every channel passes on to the down projection."""
        w = w or self.view.weights()
        assert w.w_gate_FD is not None
        gate_TF = nn.functional.linear(x_TD, w.w_gate_FD, w.b_gate_F)
        return activation(gate_TF, self.view.act) * nn.functional.linear(x_TD, w.w_up_FD, w.b_up_F)

    # -- who lives ----------------------------------------------------------------------------------------------------

    def mask(self, x_TD: Tensor, h_TF: Tensor, w: FFNWeights) -> Tensor:
        """bool [T, F]: living channels, `keep` in every bank (by a threshold: any number)."""
        return self._chosen(self._scores(x_TD, h_TF, w))

    def _scores(self, x_TD: Tensor, h_TF: Tensor, w: FFNWeights) -> Tensor:
        if self.selection == "predictor":
            return self.predictor.logits(x_TD, w)
        if self.selection == "random":
            return torch.rand(h_TF.shape, generator=self.chance, device=h_TF.device)
        return judged(h_TF, w, self.config)

    def _chosen(self, scores_TF: Tensor) -> Tensor:
        if self.selection == "threshold":
            return scores_TF > self.threshold.to(scores_TF.device)
        return bank_ffn.bank_mask(scores_TF.detach(), bank=self.bank, keep=self.keep)

    def coefficient(self, x_TD: Tensor, h_TF: Tensor, w: FFNWeights) -> Tensor:
        """[T, F]: what each hidden activation is multiplied by; 0 on dead channels."""
        scores_TF = self._scores(x_TD, h_TF, w)
        mask_TF = self._chosen(scores_TF)
        if self.selection != "predictor":
            return mask_TF
        if self.learning and self.config.predictor_loss and scores_TF.requires_grad:
            self.losses.append(in_bank_cross_entropy(scores_TF, judged(h_TF, w, self.config), self.bank))
        return gated(scores_TF, mask_TF, form=self.config.gate, bank=self.bank)

    @torch.no_grad()
    def missing(self, x_TD: Tensor) -> Tensor:
        """[T, D]: what the dead channels would have added to the output."""
        w = self.view.weights()
        h_TF = self.hidden(x_TD, w)
        coefficient_TF = self.coefficient(x_TD, h_TF, w).to(h_TF.dtype)
        return nn.functional.linear(h_TF - h_TF * coefficient_TF, w.w_down_DF)

    def compensate(self, x_TD: Tensor, seen: Moments | None = None) -> None:
        """Fit the compensation, if there is one, to what is missing on these inputs (and on those `seen` before)."""
        if self.predictor.compensation is not None:
            seen = seen or Moments()
            for x in x_TD.split(ROWS):
                seen.add(x, self.missing(x))
            self.predictor.compensation.take(seen)

    # -- for the method -----------------------------------------------------------------------------------------------

    def set_threshold(self, x_TD: Tensor) -> None:
        """The threshold that passes `keep / bank` of the channels on these inputs."""
        w = self.view.weights()
        size_TF = judged(self.hidden(x_TD, w), w, self.config).flatten()
        passed = max(1, round(size_TF.numel() * self.keep / self.bank))
        self.threshold = size_TF.kthvalue(max(1, size_TF.numel() - passed)).values.cpu()

    def to(self, device: torch.device) -> None:
        """Keep the predictor where the weights are."""
        if self.predictor.tilt_F.device != device:
            self.predictor.to(device)
            self.chance = torch.Generator(device).manual_seed(self.chance.initial_seed())
            self.stale()


def check(view: anatomy.FFNView, config: Upcycle) -> None:
    """Raise where the config does not fit the FFN."""
    if view.kind != "gated":
        raise UnsupportedModelError(
            f"Upcycle: {view.name} has two matrices and no gate; Upcycle needs gated FFNs (SwiGLU, GeGLU, ReGLU): use"
            " SSD for this model"
        )
    if view.n_channels % config.bank:
        fits = [b for b in range(2, 257) if view.n_channels % b == 0]
        near = sorted(sorted(fits, key=lambda b: abs(b - config.bank))[:3])
        raise ConfigError(
            f"Upcycle: bank={config.bank} does not divide the {view.n_channels} channels of {view.name}; use"
            f" {', '.join(map(str, near)) or 'another model'}, and keep a quarter of it"
        )
