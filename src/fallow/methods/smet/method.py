"""SMET on a whole model: every linear layer of the blocks packed, a topology that moves every `update_every` steps.

`after_step` moves it, one layer at a time: weights, moments, masters and age bytes follow through one dense buffer.
Nothing else differs from dense training, so evaluation, generation and both modes see the same sparse weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fallow import anatomy
from fallow.errors import CheckpointError, ConfigError
from fallow.method import Method, Mode
from fallow.methods.smet import memory, topology
from fallow.methods.smet.blocks import BlockLinear
from fallow.methods.smet.clock import FIRST, Clock, older
from fallow.methods.smet.config import SMET
from fallow.methods.smet.layers import PackedLinear, SparseLinear
from fallow.methods.smet.optimizer import SMETAdamW
from fallow.ops.packed import naive as bits
from fallow.optim import decay_groups
from fallow.shards import put, whole

_CARRIED = ("exp_avg", "exp_avg_sq", "master", "age")


class SMETMethod(Method):
    name = "smet"
    config: SMET

    def __init__(self, model: PreTrainedModel, config: SMET) -> None:
        found = anatomy.inspect(model)
        super().__init__(model, config)
        self.n_layers = found.n_layers
        self.views = found.linears
        self.per_row = config.structure == "fan_in"
        shapes = [(v.n_out, v.n_in) for v in self.views]
        grids = [topology.grid_of(v.name, s, config.block) for v, s in zip(self.views, shapes, strict=True)]
        shares = topology.densities(shapes, config.density, config.distribution)
        self.layers = [self._replace(*all_of) for all_of in enumerate(zip(self.views, grids, shares, strict=True))]
        self.clock = Clock()
        self.updates = 0
        self._fraction = 0.0
        self._optimizer: SMETAdamW | None = None
        self._candidates: dict[int, Tensor] = {}
        self._hooks = (
            model.register_load_state_dict_pre_hook(self._check_loaded),
            model.register_load_state_dict_post_hook(self._after_load),
        )

    def _replace(self, number: int, of: tuple[anatomy.LinearView, tuple[int, int], float]) -> SparseLinear:
        """Put a sparse layer in the place of a linear layer, and free the dense weight."""
        view, grid, density = of
        c, weight_OI = self.config, view.weight().detach()
        count = topology.active_count(grid, density, per_row=self.per_row)
        score = None
        if c.init == "magnitude":
            b = c.block or 1
            score = weight_OI.float().abs().view(grid[0], b, grid[1], b).mean((1, 3))
        g = topology.generator(c.seed, 0, number)
        mask_RC = topology.first_mask(score, grid, count, per_row=self.per_row, g=g)
        if c.block is None:
            layer: SparseLinear = PackedLinear(view.module, weight_OI, mask_RC, per_row=self.per_row)
        else:
            layer = BlockLinear(view.module, weight_OI, mask_RC, block=c.block)
        parent, _, child = view.name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, layer)
        view.module.weight = None  # type: ignore[assignment]  # the dense weight goes; remove() builds it anew
        return layer

    # -- the step -----------------------------------------------------------------------------------------------------

    def before_step(self, step: int, total_steps: int) -> None:
        c = self.config
        moves = (
            c.update_every > 0
            and (step + 1) % c.update_every == 0
            and step + 1 < total_steps
            and step + 1 <= c.stop_at * total_steps
        )
        self._fraction = 0.0
        if moves:
            self._fraction = topology.fraction_at(
                step,
                total_steps,
                start=c.update_fraction,
                end=c.final_fraction,
                schedule=c.fraction_schedule,
                stop_at=c.stop_at,
            )
        self._candidates.clear()
        for number, layer in enumerate(self.layers):
            watched = self._fraction > 0 and c.growth == "gradient"
            layer.probe = partial(self._note_growth, number) if watched else None

    def _note_growth(self, number: int, dy_TO: Tensor, x_TI: Tensor) -> None:
        """Backward of a step that moves the topology: keep which units this micro-batch's gradient would grow."""
        layer = self.layers[number]
        alive_RC = layer.mask()
        score_RC = layer.growth_scores(dy_TO, x_TI)
        n = topology.moving_of(alive_RC, self._fraction, per_row=self.per_row)
        born_RC = topology.largest(score_RC.masked_fill_(alive_RC, -torch.inf), n, per_row=self.per_row)
        self._candidates[number] = bits.pack_bits(born_RC)

    def after_step(self, step: int, total_steps: int) -> None:
        if self._fraction <= 0:
            return
        if self._optimizer is None:
            raise ConfigError(
                "SMET moves weights together with their optimizer state; train with handle.optimizer(...), or set"
                " update_every=0"
            )
        self.updates += 1
        for number, layer in enumerate(self.layers):
            self._move(number, layer)
        self.clock.moved(step + 1)
        self._fraction = 0.0
        self._candidates.clear()

    @torch.no_grad()
    def _move(self, number: int, layer: SparseLinear) -> None:
        assert self._optimizer is not None
        state = self._optimizer.state.get(layer.values, {})
        values = whole(layer.values)
        master = whole(state["master"]) if "master" in state else None
        if self.config.growth == "gradient" and number not in self._candidates:
            raise ConfigError("SMET: growth='gradient' needs a backward pass in every step that moves the topology")
        bitmap = layer.moved(
            values if master is None else master,
            self._fraction,
            per_row=self.per_row,
            g=topology.generator(self.config.seed, self.updates, number),
            candidates=self._candidates.pop(number, None),
        )
        if "age" not in state and torch.equal(bitmap, layer.bitmap):
            return  # nothing was ever born here: the step stays plain AdamW's
        if state and self.config.local_clock:
            if "age" not in state:
                state["age"] = torch.full_like(layer.values.detach(), FIRST, dtype=torch.uint8)
            put(state["age"], older(whole(state["age"])))
        carry = layer.rebuild(bitmap)
        put(layer.values, carry(values))
        for key in _CARRIED:
            if key in state:
                put(state[key], carry(whole(state[key])))

    # -- optimizer, logs, state ---------------------------------------------------------------------------------------

    def optimizer(
        self, *, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> SMETAdamW:
        """AdamW with a clock per packed weight. Packed layers of density d learn at lr · d^-lr_exponent, in groups of
        their own. The last one made is the one whose state the topology moves."""
        groups: list[dict[str, Any]] = []
        packed: dict[float, list[nn.Parameter]] = {}
        for layer in self.layers:
            if layer.values.requires_grad:
                packed.setdefault(self._density(layer), []).append(layer.values)
        for density, params in packed.items():
            rate = lr * density**-self.config.lr_exponent
            groups.append({"params": params, "lr": rate, "weight_decay": weight_decay, "packed": True})
        own = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        groups += [group | {"packed": False} for group in decay_groups(rest, weight_decay)]
        self._optimizer = SMETAdamW(
            groups,
            clock=self.clock,
            config=self.config,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        return self._optimizer

    @staticmethod
    def _density(layer: SparseLinear) -> float:
        return layer.values.numel() / (layer.out_features * layer.in_features)

    def metrics(self) -> dict[str, float]:
        total = sum(layer.out_features * layer.in_features for layer in self.layers)
        return {
            "smet/density": sum(layer.values.numel() for layer in self.layers) / total,
            "smet/updates": float(self.updates),
        }

    def layer_metrics(self) -> dict[str, list[float]]:
        """`density` of the decoder layers, over their linear layers."""
        alive, total = [0] * self.n_layers, [0] * self.n_layers
        for view, layer in zip(self.views, self.layers, strict=True):
            alive[view.layer] += layer.values.numel()
            total[view.layer] += layer.out_features * layer.in_features
        return {"density": [a / t for a, t in zip(alive, total, strict=True)]}

    def memory(self) -> dict[str, Any]:
        """Bytes of model state by kind, counted and predicted, beside those of dense AdamW (see `memory.account`).
        Gradients are counted only while they exist, between `backward` and `zero_grad`."""
        return memory.account(self.model, self.layers, self._optimizer, self.config)

    def state_dict(self) -> dict[str, Any]:
        """When the topology moved. The topology itself is in the model's state, ages in the optimizer's."""
        return {
            "method": self.name,
            "n_layers": self.n_layers,
            "density": self.config.density,
            "updates": self.updates,
            "update_steps": torch.tensor(self.clock.updates, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("method") != self.name or state.get("n_layers") != self.n_layers:
            raise CheckpointError(
                f"this state is of {state.get('method')!r} with {state.get('n_layers')} layers, not of 'smet' with"
                f" {self.n_layers}; resume with the recipe that wrote it"
            )
        if state["density"] != self.config.density:
            raise CheckpointError(
                f"this state is of density {state['density']}, the config says {self.config.density}; resume with the"
                " recipe that wrote it"
            )
        self.updates = int(state["updates"])
        self.clock.updates = [int(s) for s in state["update_steps"]]

    def _check_loaded(self, _module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before anything is copied: every bitmap that comes must fit its values and this model."""
        for view, layer in zip(self.views, self.layers, strict=True):
            name = f"{prefix}{view.name}."
            if (bitmap := state.get(f"{name}bitmap")) is not None and (
                values := state.get(f"{name}values")
            ) is not None:
                layer.check(bitmap, values.shape, f"{name}bitmap")

    def _after_load(self, _module: nn.Module, _keys: Any) -> None:
        for layer in self.layers:
            layer.refresh()

    def set_mode(self, mode: Mode) -> None:
        """Both modes compute the same: a dead weight is a zero."""
        if mode not in ("dense", "sparse"):
            raise ConfigError(f"mode {mode!r}; use 'dense' or 'sparse'")
        self.mode = mode

    def remove(self) -> PreTrainedModel:
        """The stock model, dead weights as zeros. Needs the dense model's memory; under FSDP2 a collective."""
        for hook in self._hooks:
            hook.remove()
        for view, layer in zip(self.views, self.layers, strict=True):
            weight_OI = layer.dense_weight().detach()
            stored = weight_OI if anatomy.out_dim(view.module) == 0 else weight_OI.t().contiguous()
            view.module.weight = nn.Parameter(stored, requires_grad=layer.values.requires_grad)
            view.module.bias = layer.bias  # type: ignore[assignment]  # None where the stock layer has none
            view.module.training = layer.training
            parent, _, child = view.name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, view.module)
        self.model._fallow = None  # type: ignore[assignment]
        return self.model
