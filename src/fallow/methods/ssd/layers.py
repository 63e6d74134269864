"""`ExpertFFN`: one FFN of the model, computed whole or by the experts of each token.

It stands in the FFN's place and owns no weight of it. Neurons are reordered in the stock parameters themselves, expert
after expert, so that an expert is a contiguous block; `ids` says which neuron of the beginning stands where.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fallow import anatomy
from fallow.errors import ConfigError
from fallow.methods.ssd.config import SSD
from fallow.methods.ssd.router import route
from fallow.ops.activation import RELUS, activation
from fallow.ops.expert_ffn import expert_ffn

Observer = Callable[["ExpertFFN", Tensor], None]
"""Called in forward with (layer, x [T, D])."""


class ExpertFFN:
    """One FFN. Attributes:

    view: where its weights are.
    n_experts, active: E and k.
    ids: int64 [F], the number at the beginning of the run of the neuron that stands at each place.
    router: fp32 [E, D] parameter, zero until the first partition.
    sparse: whether the next forward computes k experts; set by the method.
    used: bool [E], experts that some token of this step chose.
    """

    def __init__(self, view: anatomy.FFNView, *, experts: int, active: int) -> None:
        self.view, self.n_experts, self.active = view, experts, active
        device = view.weights().w_up_FD.device
        self.ids = torch.arange(view.n_channels, device=device)
        self.router = nn.Parameter(torch.zeros(experts, view.d_model, device=device))
        self.partitioned = False
        self.sparse = False
        self.used = torch.zeros(experts, dtype=torch.bool, device=device)
        self.observer: Observer | None = None
        view.install(self.forward)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(self, x.reshape(-1, x.shape[-1]))
        if not self.sparse:
            return self.view.dense(x)
        choice_Tk, share_Tk = route(x.reshape(-1, x.shape[-1]), self.router, self.active)
        if torch.is_grad_enabled():
            self.used.index_fill_(0, choice_Tk.flatten(), True)
        # 1 in value, only its gradient counts; with every expert chosen there is nothing for a router to learn
        coefficient_Tk = None if self.active == self.n_experts else 1 + share_Tk - share_Tk.detach()
        w = self.view.weights()
        return expert_ffn(
            x,
            choice_Tk,
            coefficient_Tk,
            w.w_gate_FD,
            w.w_up_FD,
            w.w_down_DF,
            w.b_gate_F,
            w.b_up_F,
            w.b_down_D,
            act=self.view.act,
            experts=self.n_experts,
        )

    def to(self, device: torch.device) -> None:
        """Keep the router and the neurons' numbers where the weights are."""
        if self.router.device != device:
            self.router.data = self.router.data.to(device)
            self.ids, self.used = self.ids.to(device), self.used.to(device)

    def hidden(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(bool [T, F] which neurons fire, [T, F] what they pass on to the down projection)."""
        w = self.view.weights()
        up_TF = nn.functional.linear(x_TD, w.w_up_FD, w.b_up_F)
        fire_TF = up_TF if w.w_gate_FD is None else nn.functional.linear(x_TD, w.w_gate_FD, w.b_gate_F)
        h_TF = activation(fire_TF, self.view.act)
        return fire_TF > 0, h_TF if w.w_gate_FD is None else h_TF * up_TF

    @torch.no_grad()
    def adopt(self, order_F: Tensor, router_ED: Tensor) -> None:
        """The neurons have been put in this order, expert after expert."""
        self.ids = self.ids[order_F]
        self.router.copy_(router_ED)
        self.partitioned = True

    @torch.no_grad()
    def refit(self, router_ED: Tensor) -> None:
        """Another router for the same experts."""
        self.router.copy_(router_ED)

    @torch.no_grad()
    def restore(self, ids_F: Tensor, router_ED: Tensor, *, partitioned: bool) -> None:
        """As a checkpoint has it; the weights are in that order already."""
        self.ids = ids_F.to(self.ids.device)
        self.router.copy_(router_ED)
        self.partitioned = partitioned


def check(c: SSD, active: tuple[int, ...], found: anatomy.Anatomy) -> None:
    """Raise ConfigError where the config does not fit the model."""
    if len(active) != found.n_layers:
        raise ConfigError(f"SSD: active has {len(active)} numbers, the model {found.n_layers} layers")
    for view in found.ffns:
        if view.n_channels % c.experts:
            fits = [e for e in range(2, 129) if view.n_channels % e == 0 and e >= max(active)]
            near = sorted(sorted(fits, key=lambda e: abs(e - c.experts))[:3])
            raise ConfigError(
                f"SSD: experts={c.experts} does not divide the {view.n_channels} channels of {view.name};"
                f" use {', '.join(map(str, near)) or 'another model'}"
            )
        if c.relu == "require" and view.act not in RELUS:
            raise ConfigError(
                f"SSD: {view.name} uses {view.act}, whose neurons are never off; train a model with hidden_act:"
                " relu, or say relu='swap' to put ReLU in its place (the model then needs training)"
            )
