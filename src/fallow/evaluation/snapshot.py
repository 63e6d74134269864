"""A layer as it was before a repair: to put it back bit for bit, and to say what a repair changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fallow.methods.upcycle.layers import GatedFFN


def weights_of(layer: GatedFFN) -> list[nn.Parameter]:
    """The FFN's own matrices."""
    found = {id(c.parameter): c.parameter for c in layer.view.parameters_along_channels()}
    return list(found.values())


class Snapshot:
    """A layer as it is: what it keeps, its predictor and its weights."""

    def __init__(self, layer: GatedFFN) -> None:
        self.layer, self.keep = layer, layer.keep
        self.predictor, self.started = copy_of(layer.predictor), layer.predictor.started
        self.weights = [p.detach().clone() for p in weights_of(layer)]

    @torch.no_grad()
    def restore(self) -> None:
        """Bit for bit."""
        self.layer.keep = self.keep
        self.layer.predictor.load_state_dict(self.predictor)
        self.layer.predictor.started = self.started
        for p, was in zip(weights_of(self.layer), self.weights, strict=True):
            p.copy_(was)
        self.layer.stale()

    def changes(self) -> list[str]:
        """What is not as it was, in words."""
        layer, found = self.layer, []
        if layer.keep != self.keep:
            found.append(f"keep {self.keep} → {layer.keep}")
        state = layer.predictor.state_dict()
        found += [f"predictor.{n}" for n, was in self.predictor.items() if not torch.equal(was, state[n])]
        names = dict.fromkeys(c.name for c in layer.view.parameters_along_channels())
        for name, p, was in zip(names, weights_of(layer), self.weights, strict=False):
            if not torch.equal(p.detach(), was):
                found.append(name)
        return found


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    """Its state, no tensor shared."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
