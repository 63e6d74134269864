"""Making experts of a whole model: one pass over the held-out batch finds partitions and routers, then neurons move.

Everything that needs weights and activations happens inside the pass, layer by layer, where FSDP2 has the weights
gathered anyway. Without a batch, partitions come from the weights alone and routers are centroids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fallow.methods.ssd import clustering
from fallow.methods.ssd.config import SSD
from fallow.methods.ssd.layers import ExpertFFN
from fallow.methods.ssd.monitor import down_norms
from fallow.methods.ssd.router import centroid_router, fitted_router, mass, recall, route
from fallow.shards import whole


@dataclass(slots=True)
class Plan:
    """What one layer becomes."""

    order_F: Tensor
    """The neuron at place order_F[i] goes to place i."""
    router_ED: Tensor
    facts: dict[str, Any]
    """For the log."""


def generator(seed: int, step: int, layer: int, salt: int = 0) -> torch.Generator:
    """Draws that depend on these four numbers only."""
    mixed = (seed * 1_000_003 + step * 7_919 + layer * 104_729 + salt * 15_485_863) & 0x7FFF_FFFF_FFFF_FFFF
    return torch.Generator().manual_seed(mixed)


def rows_of(layer: ExpertFFN) -> Tensor:
    """fp32 [F, D]: the weights that decide whether a neuron fires. Of sharded weights a collective."""
    w = layer.view.weights()
    return whole(w.w_up_FD if w.w_gate_FD is None else w.w_gate_FD).float()


def plan_layer(config: SSD, layer: ExpertFFN, number: int, step: int, x_TD: Tensor | None) -> Plan:
    """The partition and the router of one layer.

    Args:
        number: of the layer, for the draws.
        x_TD: inputs of the FFN on the held-out batch; None where there is none.
    """
    E, F = layer.n_experts, layer.view.n_channels
    rows_FD = rows_of(layer)
    fire_TF = h_TF = None
    if x_TD is not None:
        fire_TF, h_TF = layer.hidden(x_TD)
    features_Fd = rows_FD
    if config.cluster_by == "activations" and fire_TF is not None:
        features_Fd = fire_TF.t().float()
    features_Fd = torch.nn.functional.normalize(features_Fd, dim=1)
    last_F = torch.arange(F, device=rows_FD.device) // (F // E) if layer.partitioned else None

    def parted(salt: int, last: Tensor | None = None) -> Tensor:
        g = generator(config.seed, step, number, salt)
        return clustering.partition_of(config.partition, features_Fd, E, g, last).to(rows_FD.device)

    assignment_F = parted(0, last_F)
    order_F = torch.argsort(assignment_F, stable=True)
    facts: dict[str, Any] = {"cohesion": clustering.objective(features_Fd, assignment_F, E)}
    if config.partition == "balanced":
        facts["noise_floor"] = clustering.overlap(parted(1), parted(2), E)
    if last_F is not None:
        facts["overlap"] = clustering.overlap(assignment_F, last_F, E)
    router_ED = centroid_router(rows_FD[order_F], E)
    if x_TD is not None and h_TF is not None:
        norms_F = down_norms(layer)
        router_ED, kept = _router(config, x_TD, mass(h_TF[:, order_F], norms_F[order_F], E), router_ED, layer.active)
        by_chance_F = clustering.random_partition(F, E, generator(config.seed, step, number, 3))
        chance_F = torch.argsort(by_chance_F, stable=True).to(rows_FD.device)
        by_chance_TE = mass(h_TF[:, chance_F], norms_F[chance_F], E)
        _, control = _router(config, x_TD, by_chance_TE, centroid_router(rows_FD[chance_F], E), layer.active)
        facts |= kept | {f"random_{name}": value for name, value in control.items()}
    return Plan(order_F, router_ED, facts)


def fit_router(config: SSD, layer: ExpertFFN, x_TD: Tensor) -> Tensor:
    """fp32 [E, D]: the router that the config asks for, for the experts as they stand."""
    _, h_TF = layer.hidden(x_TD)
    mass_TE = mass(h_TF, down_norms(layer), layer.n_experts)
    return _router(config, x_TD, mass_TE, centroid_router(rows_of(layer), layer.n_experts), layer.active)[0]


def _router(
    config: SSD, x_TD: Tensor, mass_TE: Tensor, centroid_ED: Tensor, active: int
) -> tuple[Tensor, dict[str, float]]:
    """The router asked for, and its recall on every other token; it is fitted on the tokens between them."""
    fitted = config.router == "fitted" and x_TD.shape[0] > 1
    tried_ED = fitted_router(x_TD[::2], mass_TE[::2]) if fitted else centroid_ED
    choice_Tk, _ = route(x_TD[1::2] if fitted else x_TD, tried_ED, active)
    found, best = recall(choice_Tk, mass_TE[1::2] if fitted else mass_TE)
    router_ED = fitted_router(x_TD, mass_TE) if fitted else centroid_ED
    return router_ED, {"recall": found, "oracle": best}
