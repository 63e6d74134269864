"""AdamW with fp32 masters for bf16 parameters, and the option to leave the neurons that took no part in a step
untouched.

bf16 has 8 bits of mantissa: an update below 1/256 of a weight is lost, so pure-bf16 training needs a master copy (or
stochastic rounding). The obvious alternative, fp32 parameters under autocast, is 4 times slower forwards and backwards
on CPU. Cost: 14 bytes of state and weight per bf16 weight, one pass over memory per step with the native kernel
(`fallow.ops.adamw`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fallow.errors import CheckpointError, ConfigError
from fallow.ops import adamw

if TYPE_CHECKING:
    from torch import nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(kw_only=True, slots=True)
class LazyRows:
    """The neurons of one parameter that took part in this step."""

    dim: int
    """0: `index` names rows. 1: it names columns of a matrix."""
    index: Tensor
    """int64 [K], distinct, in the numbering of the whole (unsharded) parameter, on any device."""


Lazy = Callable[["nn.Parameter"], LazyRows | None]
"""Asked for every parameter with a gradient at every step; None means that all of it took part."""


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _local_range(param: Tensor, dim: int) -> tuple[int, int]:
    """Where this rank's part of `param` starts along `dim`, and its length there."""
    if not isinstance(param, DTensor):
        return 0, param.shape[dim]
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return offset[dim], shape[dim]


def _new_clock(param: Tensor, dim: int, step: int) -> Tensor:
    """int32 [size of `dim`] filled with `step`; of a sharded parameter a DTensor, sharded as that dimension is."""
    _, length = _local_range(param, dim)
    clock = torch.full((length,), step, dtype=torch.int32, device=param.device)
    if not isinstance(param, DTensor):
        return clock
    placements = [Shard(0) if p.is_shard(dim) else Replicate() for p in param.placements]
    size = torch.Size((param.shape[dim],))
    return DTensor.from_local(clock, param.device_mesh, placements, run_check=False, shape=size, stride=(1,))


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with fp32 state whatever the dtype of the parameters; FSDP2 (DTensor) parameters
    are served.

    State per parameter: `step` (scalar), `exp_avg`, `exp_avg_sq` (fp32), `master` (fp32, of a bf16 or fp16 parameter
    only), and `clock` (int32 per row or column, once `lazy` named some of them) with `lazy_dim`. For fp32 parameters
    the update is bit-equal to `torch.optim.AdamW` with the naive backend; the native kernel rounds its square root
    correctly where PyTorch built on MKL does not, and so differs by at most an ulp of the update.

    Args:
        params: parameters or parameter groups, of dtype float32, bfloat16 or float16.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        lazy: names the neurons that took part in a step; the others keep weight, moments, decay and clock frozen
            [ours].

    Raises:
        ConfigError: a setting is out of range, or a parameter has another dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lazy: Lazy | None = None,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ConfigError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas {betas} must lie in [0, 1)")
        self.lazy = lazy
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for param in group["params"]:
                if param.dtype not in _DTYPES:
                    raise ConfigError(f"a parameter of dtype {param.dtype}; AdamW serves float32, bfloat16 and float16")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("lazy", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float = 1.0) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss (as in torch).
            grad_scale: gradients are multiplied by this on the fly, for clipping without a pass of its own.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            hyper = adamw.Hyper(
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=grad_scale,
            )
            tensors: list[adamw.Tensors] = []
            steps: list[int] = []
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self._state_of(param)
                state["step"] += 1
                part = self._tensors(param, state)
                if self._own_update(param, state, part, group, hyper):
                    continue
                taken = self.lazy(param) if self.lazy is not None else None
                if taken is None and "clock" not in state:
                    tensors.append(part)
                    steps.append(int(state["step"]))
                else:
                    self._lazy_step(param, state, part, taken, hyper)
            adamw.dense(tensors, steps, hyper)
        return loss

    def _own_update(
        self, param: nn.Parameter, state: dict[str, Any], part: adamw.Tensors, group: dict[str, Any], hyper: adamw.Hyper
    ) -> bool:
        """For subclasses: update `param` in another way and return True."""
        return False

    def _state_of(self, param: nn.Parameter) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
            if param.dtype != torch.float32:
                state["master"] = param.detach().float()
        return state

    @staticmethod
    def _tensors(param: nn.Parameter, state: dict[str, Any]) -> adamw.Tensors:
        assert param.grad is not None
        if param.grad.is_sparse:
            raise ConfigError("AdamW serves dense gradients; build the embedding with sparse=False")
        return adamw.Tensors(
            param=_local(param.detach()),
            master=_local(state["master"]) if "master" in state else None,
            exp_avg=_local(state["exp_avg"]),
            exp_avg_sq=_local(state["exp_avg_sq"]),
            grad=_local(param.grad),
        )

    @staticmethod
    def _lazy_step(
        param: nn.Parameter, state: dict[str, Any], part: adamw.Tensors, taken: LazyRows | None, hyper: adamw.Hyper
    ) -> None:
        if "clock" not in state:
            assert taken is not None
            if taken.dim not in (0, 1) or taken.dim >= param.ndim:
                raise ConfigError(f"lazy dim {taken.dim} of a parameter of shape {tuple(param.shape)}; use 0 or 1")
            state["lazy_dim"] = taken.dim
            state["clock"] = _new_clock(param, taken.dim, int(state["step"]) - 1)
        dim = state["lazy_dim"]
        if taken is not None and taken.dim != dim:
            raise ConfigError(
                f"lazy dim {taken.dim} for a parameter whose clocks count dim {dim}; keep one dim for each parameter"
            )
        start, length = _local_range(param, dim)
        if taken is None:
            index = torch.arange(length, device=part.param.device)
        else:
            index = taken.index.to(part.param.device)
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= param.shape[dim]):
                raise ConfigError(
                    f"lazy index outside [0, {param.shape[dim]}) of dim {dim}; give indices of this parameter"
                )
            index = index[(index >= start) & (index < start + length)] - start
        adamw.subset(part, dim, index, _local(state["clock"]), hyper)

    def _needed(self, param: Tensor) -> dict[str, torch.dtype]:
        """State tensors of `param`'s shape that a saved state must hold."""
        needed = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        return needed | ({"master": torch.float32} if param.dtype != torch.float32 else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()` bit for bit.

        torch's own method casts state to the parameter's dtype, which would round the fp32 master and moments of a bf16
        parameter. So the tensors are put back as they were saved after torch has checked and mapped the groups.

        Raises:
            CheckpointError: groups or shapes do not fit, or the state was saved by an optimizer without fp32 masters.
        """
        try:
            super().load_state_dict(state_dict)
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"optimizer state does not fit this model: {error}; resume with the same model and groups"
            ) from error
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(saved_id)
            if not saved:
                continue
            for key, dtype in self._needed(param).items():
                value = saved.get(key)
                if value is None or value.dtype != dtype or value.shape != param.shape:
                    found = "nothing" if value is None else f"{value.dtype} {tuple(value.shape)}"
                    raise CheckpointError(
                        f"optimizer state '{key}': wanted {dtype} {tuple(param.shape)}, found {found}; "
                        "it was saved by another optimizer or for another model, start without it"
                    )
            self.state[param] = {key: _restored(key, value, param) for key, value in saved.items()}


def _restored(key: str, value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if key == "step" else value.detach().clone().to(param.device)


def decay_groups(params: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: decay on matrices, none on biases and norms (1-D). Empty groups are left out."""
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def adamw_for(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    lazy: Lazy | None = None,
) -> AdamW:
    """`AdamW` for every trainable parameter of `model`: decay on matrices, none on biases and norms (1-D); tied weights
    once.

    Raises:
        ConfigError: the model has no trainable parameter.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("the model has no trainable parameter; set requires_grad on what is to be trained")
    return AdamW(
        decay_groups(trainable, weight_decay), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, lazy=lazy
    )
