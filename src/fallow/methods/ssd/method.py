"""SSD on a whole model: observe, decide, sort neurons into experts, and let each forward run dense or sparse.

All that changes between steps happens in `before_step`: an observation when one is due, a decision (`switching`), and
where it says so a new partition, which reorders weights and optimizer state in place. The forward only looks at one
flag per layer. Weights stay where stock transformers keep them; routers are the method's own parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fallow import anatomy
from fallow.errors import CheckpointError, ConfigError
from fallow.method import Method, Mode
from fallow.methods.ranks import agreed, any_rank, mean_over_ranks
from fallow.methods.ssd import monitor, switching
from fallow.methods.ssd.config import SSD
from fallow.methods.ssd.layers import ExpertFFN, check
from fallow.methods.ssd.partitioning import Plan, fit_router, generator, plan_layer
from fallow.methods.ssd.payoff import payoff
from fallow.methods.ssd.permuting import permute
from fallow.methods.ssd.watching import ExpertWatch
from fallow.ops.activation import RELUS
from fallow.optim import AdamW, LazyRows, decay_groups
from fallow.shards import reshard


class SSDMethod(Method):
    name = "ssd"
    two_modes = True
    config: SSD

    def __init__(self, model: PreTrainedModel, config: SSD) -> None:
        found = anatomy.inspect(model)
        super().__init__(model, config)
        self.n_layers = found.n_layers
        active = config.active if isinstance(config.active, tuple) else (config.active,) * found.n_layers
        check(config, active, found)
        if config.relu == "swap" and any(view.act not in RELUS for view in found.ffns):
            anatomy.put_relu(model, found)
        self.layers = [ExpertFFN(v, experts=config.experts, active=k) for v, k in zip(found.ffns, active, strict=True)]
        self.log: list[switching.Entry] = []
        self.observations: list[dict[str, Any]] = []
        self.partitions: list[dict[str, Any]] = []
        self.patterns = [
            monitor.Patterns(monitor.sampled_neurons(layer.view.n_channels, generator(config.seed, 0, n, salt=9)))
            for n, layer in enumerate(self.layers)
        ]
        self.watched = ExpertWatch(model, self.layers)
        self._asked = False
        self._sparse_step = False
        self._optimizer: AdamW | None = None
        self._channels: dict[int, tuple[ExpertFFN, int, int]] = {}
        self._hooks = [model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        self._hooks += [layer.router.register_hook(mean_over_ranks) for layer in self.layers]

    # -- the step -----------------------------------------------------------------------------------------------------

    def before_step(self, step: int, total_steps: int) -> None:
        self._follow_model()
        if switching.due(self.config, step, total_steps) and (not self.log or self.log[-1].step < step):
            entry = switching.decide(self.config, self.log, step, total_steps, self.observe(step))
            if entry.repartition:
                self.partition(step)
            self.log.append(entry)
        phase = self.log[-1].phase if self.log else "dense"
        self._sparse_step = phase == "sparse" or (phase == "mixed" and step % 2 == 1)
        for layer in self.layers:
            layer.used.zero_()
            layer.router.grad = None  # `model.zero_grad()`, which trainers call, does not reach it

    def after_step(self, step: int, total_steps: int) -> None:
        """After the last step of a run that ends dense, routers are fitted to the weights as they are now."""
        if step + 1 == total_steps and self.log and self.log[-1].phase == "dense" and self._parted:
            self._refit()

    @property
    def _by_experts(self) -> bool:
        """Whether this step is computed sparse."""
        return self._sparse_step and self.mode == "sparse"

    def _follow_model(self) -> None:
        """The model may have been moved to another device since it was made sparse."""
        for layer in self.layers:
            layer.to(self.model.device)

    def _before_forward(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Start of a micro-batch: dense or sparse; the first one ever seen is watched where no other was given."""
        if self.watched.batch is None and self.model.training:
            given = {"input_ids": args[0]} if args else {}
            self.watch({k: v for k, v in (given | kwargs).items() if isinstance(v, Tensor)})
        if not self.watched.looking:
            sparse = self._by_experts if self.model.training else self._asked and self.mode == "sparse"
            for layer in self.layers:
                layer.sparse = sparse and layer.partitioned

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def probe(self) -> dict[str, Tensor] | None:
        """The watched batch."""
        return self.watched.batch

    def watch(self, batch: dict[str, Tensor]) -> None:
        """The batch all observations are made on; labels are the inputs where there are none. Rank 0's on all ranks."""
        self.watched.take(batch)

    def observe(self, step: int) -> switching.Seen:
        """Look at the watched batch and note everything; nothing where none is watched."""
        if self.watched.batch is None:
            return switching.Seen()
        seen, by_layer = self.watched.observe(self.patterns, len(self.observations), sparse=self._parted)
        self.observations.append({"step": step} | by_layer)
        return seen

    # -- experts ------------------------------------------------------------------------------------------------------

    @property
    def _parted(self) -> bool:
        return all(layer.partitioned for layer in self.layers)

    def _plans(self, step: int) -> list[Plan]:
        """A new partition and router of every layer, decided before any weight moves."""
        if self.watched.batch is None:
            return [plan_layer(self.config, layer, n, step, None) for n, layer in enumerate(self.layers)]
        plans: list[Plan] = []
        self.watched.pass_over(
            observer=lambda layer, x: plans.append(plan_layer(self.config, layer, len(plans), step, x))
        )
        return plans

    def partition(self, step: int) -> None:
        """Sort the neurons of every layer into experts anew."""
        self._follow_model()
        plans = self._plans(step)
        reshard(self.model)  # what a forward pass left gathered would not be what is kept
        for layer, plan in zip(self.layers, plans, strict=True):
            order_F = agreed(plan.order_F)
            permute(layer.view, order_F, self._optimizer)
            layer.adopt(order_F, agreed(plan.router_ED))
            if self._optimizer is not None:
                self._optimizer.state.pop(layer.router, None)
        facts = plans[0].facts
        self.partitions.append({"step": step} | {name: [p.facts[name] for p in plans] for name in facts})

    def _refit(self) -> None:
        """Routers for the experts as they are, fitted to the weights as they are now."""
        if self.watched.batch is None:
            return
        found: list[Tensor] = []
        self.watched.pass_over(observer=lambda layer, x: found.append(fit_router(self.config, layer, x)))
        for layer, router_ED in zip(self.layers, found, strict=True):
            layer.refit(agreed(router_ED))

    def experts(self) -> list[ExpertFFN]:
        """The FFNs in layer order: `view` (weights, expert after expert), `router` [E, D], `n_experts`, `active`.
        Makes experts of the weights as they are where no switch has done so yet."""
        if not self._parted:
            self.partition(self.log[-1].step if self.log else 0)
        return self.layers

    # -- the optimizer ------------------------------------------------------------------------------------------------

    def optimizer(
        self, *, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> AdamW:
        """AdamW for the model, and for the routers at `router_lr` times the rate, without decay. Experts that no token
        of a sparse step chose keep weights, moments, decay and clock as they are (ours)."""
        self._follow_model()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        groups = decay_groups(trainable, weight_decay)
        if self.config.router_lr > 0:
            routers = [layer.router for layer in self.layers]
            groups.append({"params": routers, "weight_decay": 0.0, "lr": lr * self.config.router_lr})
        self._channels = {
            id(where.parameter): (layer, where.dim, where.segments)
            for layer in self.layers
            for where in layer.view.parameters_along_channels()
        }
        self._optimizer = AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, lazy=self._taken)
        return self._optimizer

    def _taken(self, param: nn.Parameter) -> LazyRows | None:
        """Channels of the experts that some token of this step chose; None: all."""
        if not self._by_experts or id(param) not in self._channels:
            return None
        layer, dim, segments = self._channels[id(param)]
        used_E = any_rank(layer.used)
        if bool(used_E.all()):
            return None
        channels = used_E.repeat_interleave(layer.view.n_channels // layer.n_experts).repeat(segments)
        return LazyRows(dim=dim, index=channels.nonzero().squeeze(1))

    # -- what is told -------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        share = sum(layer.active for layer in self.layers) / sum(layer.n_experts for layer in self.layers)
        found: dict[str, float] = {"ssd/active_share": share if self._by_experts else 1.0}
        seen = self.log[-1].seen if self.log else switching.Seen()
        for name in ("similarity", "zeros"):
            if (value := getattr(seen, name)) is not None:
                found[f"ssd/{name}"] = value
        if seen.sparse_loss is not None and seen.dense_loss is not None:
            found["ssd/gap"] = seen.sparse_loss - seen.dense_loss
        return found

    def layer_metrics(self) -> dict[str, list[float]]:
        """Of the last observation: shares of zeros and of dead neurons, similarity, and recall, where known."""
        last = self.observations[-1] if self.observations else {}
        kept = ("zeros", "dead", "similarity", "recall")
        return {k: last[k] for k in kept if k in last and all(v is not None for v in last[k])}

    def advice(self, tokens: int) -> list[str]:
        """A line where computing `active` of `experts` is slower than dense at these widths, here and now."""
        layer, c = self.layers[0], self.config
        if c.schedule == "always_dense" or layer.active == layer.n_experts:
            return []
        found = payoff(layer, tokens)
        if found.ratio >= 1:
            return []
        up_to = "at no share" if found.break_even is None else f"up to {found.break_even:.0%} of them"
        return [
            f"{layer.active} of {layer.n_experts} experts run {found.ratio:.2f} times as fast as the dense FFN of"
            f" {layer.view.d_model}×{layer.view.n_channels} here: experts pay {up_to}; use fewer active or"
            " fewer, fatter experts (fallow bench ssd)"
        ]

    def insight(self) -> dict[str, Any]:
        """Everything seen and decided; with it, how similar each observation's patterns are to the last one's."""
        kept = self.patterns[0].at
        ends = {
            number: [monitor.correlation(known.seen[i], known.seen[-1]) for known in self.patterns]
            for i, number in enumerate(kept)
        }
        none = [None] * self.n_layers  # of an observation whose patterns were not kept
        return {
            "experts": self.config.experts,
            "active": [layer.active for layer in self.layers],
            "log": [e.as_dict() for e in self.log],
            "observations": [o | {"similarity_end": ends.get(n, none)} for n, o in enumerate(self.observations)],
            "partitions": self.partitions,
        }

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where each neuron came from, the routers, the watched batch, and everything seen and decided."""
        history = {"log": [e.as_dict() for e in self.log], "observations": self.observations}
        state: dict[str, Any] = {
            "method": self.name,
            "n_layers": self.n_layers,
            "experts": self.config.experts,
            "active": torch.tensor([layer.active for layer in self.layers]),
            "partitioned": self._parted,
            "history": json.dumps(history | {"partitions": self.partitions}),
        }
        for n, (layer, known) in enumerate(zip(self.layers, self.patterns, strict=True)):
            state |= {f"ids.{n}": layer.ids.clone(), f"router.{n}": layer.router.detach().clone()}
            if known.seen:
                state |= {f"pairs.{n}": torch.stack(known.seen), f"pairs_at.{n}": torch.tensor(known.at)}
        return state | {f"probe.{k}": v for k, v in (self.probe or {}).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("method") != self.name or state.get("n_layers") != self.n_layers:
            raise CheckpointError(
                f"this state is of {state.get('method')!r} with {state.get('n_layers')} layers, not of 'ssd' with"
                f" {self.n_layers} layers; resume with the recipe that wrote it"
            )
        if state["experts"] != self.config.experts or state["ids.0"].shape != self.layers[0].ids.shape:
            raise CheckpointError(
                f"this state has {state['experts']} experts of {state['ids.0'].numel()} channels, the config"
                f" {self.config.experts} of {self.layers[0].ids.numel()}; resume with the recipe that wrote it"
            )
        if (active := state["active"].tolist()) != [layer.active for layer in self.layers]:
            raise CheckpointError(f"this state has active={active}; resume with the recipe that wrote it")
        history, device = json.loads(state["history"]), self.model.device
        self.log = [switching.Entry.of(line) for line in history["log"]]
        self.observations, self.partitions = history["observations"], history["partitions"]
        for n, (layer, known) in enumerate(zip(self.layers, self.patterns, strict=True)):
            layer.restore(state[f"ids.{n}"], state[f"router.{n}"], partitioned=bool(state["partitioned"]))
            known.seen = list(state[f"pairs.{n}"].to(device)) if f"pairs.{n}" in state else []
            known.at = state[f"pairs_at.{n}"].tolist() if f"pairs_at.{n}" in state else []
        found = {k.removeprefix("probe."): v.to(device) for k, v in state.items() if k.startswith("probe.")}
        self.watched.batch = found or None

    def set_mode(self, mode: Mode) -> None:
        """`"sparse"`: training as the schedule says, evaluation by experts (made on the spot where there are none yet).
        `"dense"`: every neuron. Until a mode is set, evaluation is dense."""
        if mode not in ("dense", "sparse"):
            raise ConfigError(f"mode {mode!r}; use 'dense' or 'sparse'")
        self.mode, self._asked = mode, mode == "sparse"
        if self._asked:
            self.experts()

    @contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        before = self.mode, self._asked
        self.set_mode(mode)
        try:
            yield
        finally:
            self.mode, self._asked = before

    def remove(self) -> PreTrainedModel:
        """The stock model, neurons in the order of the last partition: the same function."""
        for hook in self._hooks:
            hook.remove()
        self._sparse_step = False  # an optimizer that goes on updates all
        for layer in self.layers:
            layer.view.uninstall()
        self.model._fallow = None  # type: ignore[assignment]
        return self.model
