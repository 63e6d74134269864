"""AdamW over packed weights with a clock per entry: bias correction and warm-up ramp count from an entry's own birth.

Plain Adam, told nothing, takes the run's step count: a newborn weight with empty moments then moves up to
(1 - β1) / √(1 - β2) times the learning rate in its first step (3.16 at 0.9/0.999), which is the loss spike after every
topology update. With its own clock that is 1, and the ramp makes it 1/W. Source: paper, "local clock" and "warm-up".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fallow.errors import CheckpointError
from fallow.methods.smet.clock import FIRST, Clock, tables
from fallow.methods.smet.config import SMET
from fallow.ops import adamw
from fallow.optim import AdamW
from fallow.shards import first_entry, local, put

if TYPE_CHECKING:
    from torch import nn


class SMETAdamW(AdamW):
    """`fallow.optim.AdamW` whose groups marked `packed` keep `age` (uint8 per entry) and obey `clock`.

    Before the first topology update, and for a method that has none, the step is AdamW's own, bit for bit. Global-norm
    clipping needs nothing of its own: the packed gradients are the parameters' `.grad`.

    Args:
        params: parameter groups; `{"packed": True, "layers": [...]}` marks packed values and numbers them.
        clock: shared with the method, which notes its updates in it.
        config: `local_clock`, `warmup_steps`, `state_dtype`, `seed`.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        clock: Clock,
        config: SMET,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        groups = list(params)
        self.clock, self.config = clock, config
        packed = [p for g in groups if g.get("packed") for p in g["params"]]
        self._number = {id(p): n for n, p in enumerate(packed)}
        self._made: tuple[Any, Any] = (None, None)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _own_update(
        self, param: nn.Parameter, state: dict[str, Any], part: adamw.Tensors, group: dict[str, Any], hyper: adamw.Hyper
    ) -> bool:
        if id(param) not in self._number or ("age" not in state and not self._rounds(param)):
            return False
        step, c = int(state["step"]), self.config
        sizes, roots = self._tables(step, hyper)
        age = state.get("age")
        ages = adamw.Aged(
            age=torch.full_like(part.param, FIRST, dtype=torch.uint8).view(-1) if age is None else local(age).view(-1),
            step_size=sizes,
            bias2_sqrt=roots,
            salt=(c.seed * 0x9E3779B1 + step * 0x85EBCA77 + self._number[id(param)] * 0xC2B2AE3D) & 0xFFFF_FFFF,
            offset=first_entry(param),
        )
        adamw.aged(part, ages, hyper)
        return True

    def _tables(self, step: int, hyper: adamw.Hyper) -> tuple[Tensor, Tensor]:
        """Made once per step and group, not per layer."""
        key = (step, hyper.lr, hyper.betas, self.clock.updates[-1:], self.config)
        if self._made[0] != key:
            c = self.config
            made = tables(self.clock, step, lr=hyper.lr, betas=hyper.betas, local=c.local_clock, warmup=c.warmup_steps)
            self._made = (key, made)
        return self._made[1]

    def _rounds(self, param: Tensor) -> bool:
        """Whether this parameter's state is bf16, rounded stochastically."""
        return id(param) in self._number and self.config.state_dtype == "bf16"

    def _state_of(self, param: nn.Parameter) -> dict[str, Any]:
        state = self.state[param]
        if state or not self._rounds(param):
            return super()._state_of(param)
        state["step"] = torch.tensor(0.0)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(param, dtype=torch.bfloat16, memory_format=torch.preserve_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `AdamW`'s. A fresh optimizer has no ages, so torch's full state dicts hand over whole ones, plain tensors,
        for sharded parameters: here they become this rank's part. Raises CheckpointError."""
        super().load_state_dict(state_dict)
        for param in (p for group in self.param_groups for p in group["params"] if id(p) in self._number):
            age = self.state[param].get("age") if param in self.state else None
            if age is None:
                continue
            if age.dtype != torch.uint8 or age.shape != param.shape:
                raise CheckpointError(
                    f"optimizer state 'age': wanted {torch.uint8} {tuple(param.shape)}, found {age.dtype}"
                    f" {tuple(age.shape)}; resume with the recipe that wrote it"
                )
            if isinstance(param, DTensor) and not isinstance(age, DTensor):
                self.state[param]["age"] = torch.full_like(param.detach(), FIRST, dtype=torch.uint8)
                put(self.state[param]["age"], age)

    def _needed(self, param: Tensor) -> dict[str, torch.dtype]:
        if self._rounds(param):
            return {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
        return super()._needed(param)
