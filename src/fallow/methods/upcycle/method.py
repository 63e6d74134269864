"""Upcycle on a whole model: predictors beside its FFNs, what they learn from, and which forward computes what.

In training all weights and predictors learn together, the FFNs computed as they will be served. What is added to the
language model's loss (divergence from the dense parent, the predictors' own loss) is added by a hook to the loss that
the model returns, so that any trainer trains it. Predictors are parameters of the method, outside of the stock model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from fallow import anatomy
from fallow.errors import ConfigError
from fallow.method import Method, Mode
from fallow.methods.ranks import agreed, mean_over_ranks
from fallow.methods.upcycle import state as states
from fallow.methods.upcycle.config import Selection, Upcycle
from fallow.methods.upcycle.fitting import Fitter, fit_compensation
from fallow.methods.upcycle.layers import GatedFFN
from fallow.methods.upcycle.looking import Look
from fallow.methods.upcycle.objective import Objective
from fallow.methods.upcycle.pairing import twice
from fallow.optim import AdamW, decay_groups


class UpcycleMethod(Method):
    name = "upcycle"
    two_modes = True
    sparse_from_start = True
    config: Upcycle

    def __init__(self, model: PreTrainedModel, config: Upcycle) -> None:
        found = anatomy.inspect(model)
        super().__init__(model, config)
        self.n_layers = found.n_layers
        self.keep = config.keep if isinstance(config.keep, tuple) else (config.keep,) * self.n_layers
        if len(self.keep) != self.n_layers:
            raise ConfigError(f"Upcycle: keep has {len(self.keep)} numbers, the model {self.n_layers} layers")
        self.objective = Objective(model, config)
        self.layers: list[GatedFFN] = []
        try:
            for number, (view, keep) in enumerate(zip(found.ffns, self.keep, strict=True)):
                self.layers.append(GatedFFN(view, config, number=number, keep=keep))
        except Exception:
            for layer in self.layers:
                layer.view.uninstall()
            raise
        self.prompts: Mode = config.prompts
        """May be set at any time."""
        self.looks: list[dict[str, Any]] = []
        self.fits: list[dict[str, Any]] = []
        self.step = 0
        self.watched = Look(model, self.layers)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
            model.register_state_dict_post_hook(partial(self._each_on_its_own)),  # torch sets an attribute on it
        ]
        self._hooks += [p.register_hook(mean_over_ranks) for p in self.predictor_parameters()]

    # -- the step -----------------------------------------------------------------------------------------------------

    def before_step(self, step: int, total_steps: int) -> None:
        self._follow_model()
        self.step = step
        every = round(self.config.monitor_every * total_steps)
        if every and step % max(1, every) == 0 and (not self.looks or self.looks[-1]["step"] < step):
            self.look(step)
        span = self.config.anneal * total_steps
        for layer, final in zip(self.layers, self.keep, strict=True):
            share = min(1.0, step / span) if span else 1.0
            layer.keep = layer.bank - round((layer.bank - final) * share)
            layer.annealed = share * share  # the smallest channels die first
            layer.chance.manual_seed(self._draw(step, layer.number))
            layer.lay_back()
        for p in self.predictor_parameters():
            p.grad = None  # `model.zero_grad()`, which trainers call, does not reach them

    def after_step(self, step: int, total_steps: int) -> None:
        for layer, final in zip(self.layers, self.keep, strict=True):
            layer.stale()
            if step + 1 == total_steps:
                layer.keep, layer.annealed = final, 1.0
        if step + 1 == total_steps and self.config.monitor_every:
            self.look(total_steps)

    def _draw(self, step: int, number: int) -> int:
        return (self.config.seed * 1_000_003 + step) * 1_009 + number

    def _each_on_its_own(self, model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Decoding may have laid three weights in one storage; who saves them gets each on its own."""
        for layer in self.layers:
            for where in layer.view.parameters_along_channels():
                held = state.get(prefix + where.name)
                if isinstance(held, Tensor) and not held.is_contiguous():
                    state[prefix + where.name] = held.contiguous()

    def _follow_model(self) -> None:
        """The model may have been moved to another device since it was made sparse."""
        for layer in self.layers:
            layer.to(self.model.device)

    def _before_forward(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        training = self.model.training
        paired = self.objective.paired and training and not self.watched.looking and self.mode == "sparse"
        for layer in self.layers:
            layer.paired = paired
        if self.watched.looking:
            return None
        whole = self.prompts == "dense" and not training and _is_prompt(args, kwargs)
        for layer in self.layers:
            layer.sparse = self.mode == "sparse" and not whole
            layer.learning = training
            layer.losses.clear()
            layer.heard = self.objective.outputs.append if training and self.config.hidden_loss else None
        self.objective.outputs.clear()
        return twice(args, kwargs) if paired else None

    def _after_forward(self, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Add to the loss what Upcycle learns from besides the text."""
        loss = getattr(output, "loss", None)
        if not self.model.training or loss is None or self.watched.looking or self.mode == "dense":
            return output
        given = kwargs | ({"input_ids": args[0]} if args else {})
        return self.objective.add(given, output, self.layers)

    # -- predictors ---------------------------------------------------------------------------------------------------

    def predictor_parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers for p in layer.predictor.parameters()]

    def watch(self, batch: dict[str, Tensor]) -> None:
        """The batch that starts are made from and recall is measured on. Rank 0's on all ranks."""
        self.watched.take(batch)

    def prepare(self, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Any]]:
        """First stage: fit predictors to the frozen model on `fit_tokens` tokens, and compensations to what they leave
        out; yields a record now and then."""
        self._follow_model()
        self.start()
        stream = iter(batches)
        if self.config.fit_tokens and any(layer.predictor.scoring() for layer in self.layers):
            for record in Fitter(self.watched, self.layers, self.config).run(stream):
                self.fits.append(record)
                yield record
        if self.config.compensation:
            fit_compensation(self.watched, stream)
            self._agree()

    def start(self) -> None:
        """Start the predictors that have not been started, from the weights and the watched batch if there is one."""
        if all(layer.predictor.started for layer in self.layers) and not self._thresholds_due():
            return
        self.watched.start()
        self._agree()

    def _agree(self) -> None:
        """Rank 0's predictors on all ranks."""
        for p in self.predictor_parameters():
            agreed(p.data)

    def _thresholds_due(self) -> bool:
        return any(layer.selection == "threshold" and not float(layer.threshold) for layer in self.layers)

    def look(self, step: int) -> dict[str, Any]:
        """Recall, the gap, and how evenly channels are used, on the watched batch; nothing where none is watched."""
        self.start()
        found = {"step": step} | self.watched.look()
        if len(found) > 1:
            self.looks.append(found)
        return found

    # -- the optimizer ------------------------------------------------------------------------------------------------

    def optimizer(
        self, *, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> AdamW:
        """AdamW for the model, and for predictors at `predictor_lr` times the rate, without decay."""
        self._follow_model()
        groups = decay_groups([p for p in self.model.parameters() if p.requires_grad], weight_decay)
        scoring = [p for layer in self.layers for p in layer.predictor.scoring()]
        if scoring and self.config.predictor_lr > 0:
            groups.append({"params": scoring, "weight_decay": 0.0, "lr": lr * self.config.predictor_lr})
        stand_ins = [p for layer in self.layers if (c := layer.predictor.compensation) for p in c.parameters()]
        if stand_ins:
            groups.append({"params": stand_ins, "weight_decay": 0.0})
        return AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    # -- what is told -------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        keep = sum(layer.keep for layer in self.layers) / sum(layer.bank for layer in self.layers)
        found = {"upcycle/keep_share": keep}
        last = self.looks[-1] if self.looks else {}
        if "recall" in last:
            found["upcycle/recall"] = sum(last["recall"]) / self.n_layers
            found["upcycle/gap"] = last["sparse_loss"] - last["dense_loss"]
        return found

    def layer_metrics(self) -> dict[str, list[float]]:
        last = self.looks[-1] if self.looks else {}
        return {k: last[k] for k in ("recall", "entropy", "dead") if k in last}

    def insight(self) -> dict[str, Any]:
        return {"keep": list(self.keep), "bank": self.config.bank, "looks": self.looks, "fits": self.fits}

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Predictors, what each layer keeps, and of which weights they are."""
        return states.write(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError: it is of another method, config or model."""
        states.read(self, state)

    def set_mode(self, mode: Mode) -> None:
        """`"sparse"`: `keep` channels of every bank. `"dense"`: all. Every layer follows."""
        if mode not in ("dense", "sparse"):
            raise ConfigError(f"mode {mode!r}; use 'dense' or 'sparse'")
        self.mode = mode
        for layer in self.layers:
            layer.mode = mode
            layer.stale()
        if mode == "sparse":
            self.start()

    def select(self, selection: Selection) -> None:
        """Who chooses from now on, in every layer: a control in the predictor's place, or the predictor again."""
        for layer in self.layers:
            layer.selection = selection
            layer.stale()

    @contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        before, by_layer = self.mode, [layer.mode for layer in self.layers]
        self.set_mode(mode)
        try:
            yield
        finally:
            self.mode = before
            for layer, was in zip(self.layers, by_layer, strict=True):
                layer.mode = cast(Mode, was)

    def remove(self) -> PreTrainedModel:
        """The stock, dense model with the weights as trained."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            layer.lay_back()
            layer.view.uninstall()
        self.objective.parent = None
        self.model._fallow = None  # type: ignore[assignment]
        return cast(PreTrainedModel, self.model)


def _is_prompt(args: tuple, kwargs: dict) -> bool:
    """Whether a forward is of several tokens that fill a cache: the prompt, or a part of it."""
    given = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    return kwargs.get("past_key_values") is not None and given is not None and given.shape[1] > 1
