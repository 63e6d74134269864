"""SAT on a whole model: schedule -> sizes per layer -> selection inside the next forward -> sparse step.

`before_step` decides sizes (a pure function of step, total and config) and whether to choose anew; the layers choose
on the first
micro-batch they see. Evaluation and generation are always dense: the layers are active only while `model.training`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fallow import anatomy
from fallow.errors import CheckpointError, ConfigError
from fallow.method import Method, Mode
from fallow.methods.sat import importance as scores
from fallow.methods.sat.config import SAT
from fallow.methods.sat.layers import SparseAttention, SparseFFN
from fallow.methods.sat.schedule import kept_channels, kept_units, ladder_factor, spread
from fallow.methods.sat.sensitivity import loss_increase
from fallow.optim import AdamW, LazyRows, adamw_for


class SATMethod(Method):
    name = "sat"
    config: SAT

    def __init__(self, model: PreTrainedModel, config: SAT) -> None:
        found = anatomy.inspect(model)
        super().__init__(model, config)
        importance = scores.resolve(config.importance)  # type: ignore[arg-type]
        self._check(found)
        self.n_layers = found.n_layers
        self.weights = self._layer_weights()
        self.ffns = [SparseFFN(v, config, importance) for v in found.ffns] if config.omit > 0 else []
        self.attentions = [SparseAttention(v, config, importance) for v in found.attentions] if config.heads > 0 else []
        self.factor = 1.0
        self._refresh = True
        self._keys: dict[int, tuple[int, int, Any]] = {}
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.before_step(0, 1 if config.ladder == 0 else 1 << 30)

    def _check(self, found: anatomy.Anatomy) -> None:
        c = self.config
        if not isinstance(c.layer_rates, str) and len(c.layer_rates) != found.n_layers:
            raise ConfigError(f"SAT: layer_rates has {len(c.layer_rates)} weights, the model {found.n_layers} layers")
        for v in found.attentions if c.heads > 0 else []:
            if v.n_heads % v.n_kv_heads:
                raise ConfigError(
                    f"SAT: {v.name} has {v.n_heads} query heads, not divisible by its {v.n_kv_heads} KV heads;"
                    " use heads=0"
                )
            units = v.n_kv_heads if c.head_unit == "group" else v.n_heads // v.n_kv_heads
            if units == 1:
                other = "query" if c.head_unit == "group" else "group"
                raise ConfigError(
                    f"SAT: heads={c.heads} cannot omit the only {c.head_unit} of {v.name};"
                    f" use head_unit={other!r} or heads=0"
                )

    def _layer_weights(self) -> list[float] | None:
        """Relative omission weight of each layer; None until it is measured."""
        rates, n = self.config.layer_rates, self.n_layers
        if rates == "uniform":
            return [1.0] * n
        if rates == "late":
            return [i / max(n - 1, 1) for i in range(n)] if n > 1 else [1.0]
        return None if rates == "sensitivity" else [float(w) for w in rates]

    # -- the step -----------------------------------------------------------------------------------------------------

    def before_step(self, step: int, total_steps: int) -> None:
        c = self.config
        self.factor = ladder_factor(step, total_steps, rungs=c.ladder, rung_share=c.dense_share)
        self._step = step
        self._refresh = step % c.refresh_every == 0 or c.scope == "sequence"
        self._apply_rates()

    def _apply_rates(self) -> None:
        weights = self.weights or [1.0] * self.n_layers
        ffn_rates = [r * self.factor for r in spread(self.config.omit, weights)]
        head_rates = [r * self.factor for r in spread(self.config.heads, weights)]
        for layer, ffn in enumerate(self.ffns):
            F = ffn.view.n_channels
            keep = kept_channels(F, ffn_rates[layer])
            ffn.set_keep(None if keep == F else keep, self._step)
            ffn.active = self._running
        if self.attentions:
            kept = kept_units(self.attentions[0].n_units, head_rates)
            for attention, keep in zip(self.attentions, kept, strict=True):
                attention.set_keep(None if keep == attention.n_units else keep, self._step)
                attention.activate(self._running)

    def after_step(self, step: int, total_steps: int) -> None:
        """SAT moves nothing after the optimizer's step."""

    @property
    def _running(self) -> bool:
        return self.mode == "sparse" and self.model.training

    def _before_forward(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Start of a micro-batch: follow train()/eval(), pass on which tokens bear loss, call for a choice if one is
        due."""
        running = self._running
        for layer in self.ffns:
            layer.active = running
        for layer in self.attentions:
            if layer.running != (running and layer.keep is not None):
                layer.activate(running)
        if not running:
            return
        if self.weights is None:
            self._measure_sensitivity(args, kwargs)
        if self._refresh:
            for layer in (*self.ffns, *self.attentions):
                layer.pending = layer.keep is not None
            self._refresh = self.config.scope == "sequence"
        if self.config.dense_tokens == "loss":
            mask = self._loss_mask(kwargs)
            for layer in self.ffns:
                layer.dense_mask_N = mask

    @staticmethod
    def _loss_mask(kwargs: dict) -> Tensor:
        """[B·T] bool: positions whose next token bears loss."""
        if (shifted := kwargs.get("shift_labels")) is not None:
            return (shifted != -100).flatten()
        labels = kwargs.get("labels")
        if labels is None:
            raise ConfigError(
                "SAT: dense_tokens='loss' needs labels in the model's inputs; pass labels=, or dense_tokens=None"
            )
        mask = torch.zeros_like(labels, dtype=torch.bool)
        mask[:, :-1] = labels[:, 1:] != -100
        return mask.flatten()

    def _measure_sensitivity(self, args: tuple, kwargs: dict) -> None:
        losses = loss_increase(self, args, kwargs)
        # equal marginal damage: a layer that loses twice as much for the same rate gets 1/√2 of it
        self.weights = [1 / max(x, 1e-3) ** 0.5 for x in losses]
        self._apply_rates()

    # -- optimizer, logs, state ---------------------------------------------------------------------------------------

    def optimizer(
        self, *, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> AdamW:
        """AdamW with fp32 master weights; with `lazy`, omitted rows keep weight, moments, decay and step count."""
        # now, not at construction: FSDP2 puts sharded parameters in the place of those that were there then
        self._keys = {id(p): key for key, p in self._lazy_parameters().items()} if self.config.lazy else {}
        lazy = self._lazy_rows if self.config.lazy else None
        return adamw_for(self.model, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, lazy=lazy)

    def _lazy_parameters(self) -> dict[tuple[int, int, Any], nn.Parameter]:
        """Parameters with omissible rows, keyed by (0 for FFN or 1 for attention, layer, anatomy's description)."""
        found: dict[tuple[int, int, Any], nn.Parameter] = {}
        for kind, layers, attribute in (
            (0, self.ffns, "parameters_along_channels"),
            (1, self.attentions, "parameters_along_heads"),
        ):
            for i, layer in enumerate(layers):
                for description in getattr(layer.view, attribute)():
                    found[kind, i, description] = description.parameter
        return found

    def _lazy_rows(self, parameter: nn.Parameter) -> LazyRows | None:
        key = self._keys.get(id(parameter))
        if key is None:
            return None
        kind, i, where = key
        layer = (self.ffns, self.attentions)[kind][i]
        if layer.keep is None or layer.kept is None:
            return None
        if kind == 1:
            return LazyRows(dim=where.dim, index=where.rows(*self.attentions[i].heads(layer.kept)))
        rows = layer.kept.unique() if layer.kept.dim() == 2 else layer.kept
        F = self.ffns[i].view.n_channels
        return LazyRows(dim=where.dim, index=torch.cat([rows + s * F for s in range(where.segments)]))

    def metrics(self) -> dict[str, float]:
        per_layer = self.layer_metrics()
        out = {f"sat/{k}": sum(v) / len(v) for k, v in per_layer.items() if v}
        out["sat/selection_seconds"] = sum(x.seconds for x in (*self.ffns, *self.attentions))
        return out

    def layer_metrics(self) -> dict[str, list[float]]:
        """Omission rate per layer in force: `omit_ffn` (channels) and `omit_heads`."""

        def rate(layer: SparseFFN | SparseAttention, n: int) -> float:
            return 0.0 if layer.keep is None or self.mode == "dense" else 1 - layer.keep / n

        return {
            "omit_ffn": [rate(x, x.view.n_channels) for x in self.ffns] or [0.0] * self.n_layers,
            "omit_heads": [rate(x, x.n_units) for x in self.attentions] or [0.0] * self.n_layers,
        }

    def state_dict(self) -> dict[str, Any]:
        """The choice in force per layer, and the layer weights if they were measured."""
        state: dict[str, Any] = {"method": self.name, "n_layers": self.n_layers}
        for kind, layers in (("ffn", self.ffns), ("heads", self.attentions)):
            for i, layer in enumerate(layers):
                if layer.kept is not None:
                    state[f"{kind}.{i}.kept"] = layer.kept
                    state[f"{kind}.{i}.keep"] = layer.keep
        if self.weights is not None:
            state["layer_weights"] = torch.tensor(self.weights, dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("method") != self.name or state.get("n_layers") != self.n_layers:
            raise CheckpointError(
                f"this state is of {state.get('method')!r} with {state.get('n_layers')} layers, not of 'sat' with"
                f" {self.n_layers}; resume with the recipe that wrote it"
            )
        for kind, layers in (("ffn", self.ffns), ("heads", self.attentions)):
            for i, layer in enumerate(layers):
                kept = state.get(f"{kind}.{i}.kept")
                layer.kept = kept
                layer.keep = None if kept is None else int(state[f"{kind}.{i}.keep"])
                layer.pending = False
        if "layer_weights" in state:
            self.weights = [float(w) for w in state["layer_weights"]]
        self._refresh = False
        for attention in self.attentions:
            attention.activate(self._running)

    def set_mode(self, mode: Mode) -> None:
        if mode not in ("dense", "sparse"):
            raise ConfigError(f"mode {mode!r}; use 'dense' or 'sparse'")
        self.mode = mode
        self._apply_rates()

    def remove(self) -> PreTrainedModel:
        self._hook.remove()
        for layer in self.ffns:
            layer.view.uninstall()
        for layer in self.attentions:
            layer.activate(False)
            layer.view.uninstall()
        self.model._fallow = None  # type: ignore[assignment]
        return self.model
