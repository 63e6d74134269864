"""An Upcycle's state: predictors and compensations, what each layer keeps, and a hash of the weights they belong to.

Flat, of tensors and plain scalars, as safetensors hold it. A state of another method, config or model is refused
before anything changes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from fallow.errors import CheckpointError
from fallow.methods.upcycle.fingerprint import fingerprint

if TYPE_CHECKING:
    from fallow.methods.upcycle.method import UpcycleMethod


def write(method: UpcycleMethod) -> dict[str, Any]:
    """The state."""
    state: dict[str, Any] = {
        "method": method.name,
        "n_layers": method.n_layers,
        "predictor": method.config.predictor,
        "bank": method.config.bank,
        "keep": torch.tensor([layer.keep for layer in method.layers]),
        "started": all(layer.predictor.started for layer in method.layers),
        "weights": fingerprint(method.layers),
        "history": json.dumps({"looks": method.looks, "fits": method.fits}),
    }
    for n, layer in enumerate(method.layers):
        state |= {f"layer.{n}.{k}": v.detach().clone() for k, v in layer.predictor.state_dict().items()}
        state[f"layer.{n}.threshold"] = layer.threshold
    return state | {f"probe.{k}": v for k, v in (method.watched.batch or {}).items()}


def read(method: UpcycleMethod, state: dict[str, Any]) -> None:
    """Take a state on. Raises CheckpointError: it is of another method, config or model."""
    if state.get("method") != method.name or state.get("n_layers") != method.n_layers:
        raise CheckpointError(
            f"this state is of {state.get('method')!r} with {state.get('n_layers')} layers, not of 'upcycle' with"
            f" {method.n_layers} layers; resume with the recipe that wrote it"
        )
    if (state["predictor"], state["bank"]) != (method.config.predictor, method.config.bank):
        raise CheckpointError(
            f"this state is of {state['predictor']} predictors and banks of {state['bank']}, the config of"
            f" {method.config.predictor} ones and banks of {method.config.bank}; use the config that wrote it"
        )
    here = fingerprint(method.layers)
    if state["weights"] and here and state["weights"] != here:
        raise CheckpointError(
            f"these predictors belong to other weights (hash {state['weights'][:12]}, this model {here[:12]}); load"
            " the model that was saved beside them"
        )
    for n, layer in enumerate(method.layers):
        prefix = f"layer.{n}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        layer.threshold = own.pop("threshold").cpu()
        if (shapes := {k: v.shape for k, v in own.items()}) != {
            k: v.shape for k, v in layer.predictor.state_dict().items()
        }:
            raise CheckpointError(f"predictor of layer {n}: {shapes} does not fit the config; use the one it is of")
        layer.predictor.load_state_dict(own)
        layer.predictor.started = bool(state["started"])
        layer.keep = int(state["keep"][n])
        layer.stale()
    history = json.loads(state["history"])
    method.looks, method.fits = history["looks"], history["fits"]
    found = {k.removeprefix("probe."): v.to(method.model.device) for k, v in state.items() if k.startswith("probe.")}
    method.watched.batch = found or None
