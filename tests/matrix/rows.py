"""The shared test matrix: one row per method, and every test of `test_matrix.py` and `test_fsdp.py` runs on every row.

A new method joins by appending a `Row`. `reference` must compute the same step as the sparse model by masking a stock
copy, without any of the method's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fallow import SAT, SMET, SSD, Upcycle, anatomy
from fallow.method import Method
from fallow.ops.activation import activation


@dataclass(slots=True, frozen=True)
class Row:
    name: str
    config: Callable[[], Any]
    """A setting in which everything the method can omit is omitted."""
    zero: Callable[[], Any]
    """The same method at zero sparsity."""
    reference: Callable[[Method, nn.Module], AbstractContextManager]
    """(handle after a step, stock copy of the model) -> context in which the copy computes that step with masks."""
    exact_loss: bool = False
    """The training loss is the dense one; only gradients are omitted."""
    exact_zero: bool = True
    """At zero sparsity the arithmetic is stock's to the bit, not only up to rounding."""
    same_order: bool = True
    """Neurons stay where they are; else sums in other orders differ in rounding."""
    per_token: bool = False
    """Every token has its own choice, so no neuron is without gradient; and evaluation is sparse where asked for."""
    gated_only: bool = False
    """Two-matrix FFNs are refused."""
    sparse_weights: bool = False
    """Weights are sparse, not the computation: evaluation and both modes see the same model, and what a wrapped model's
    `state_dict()` holds is smaller than the stock one."""

    def gradients(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Gradients by stock parameter name, dense."""
        found = {}
        for name, p in model.named_parameters():
            if p.grad is None:
                continue
            if self.sparse_weights and name.endswith(".values"):
                layer = model.get_submodule(name.removesuffix(".values"))
                name, gradient = name.removesuffix("values") + "weight", layer.densify(p.grad)
                found[name] = gradient.t() if isinstance(layer.stock, Conv1D) else gradient
            else:
                found[name] = p.grad.clone()
        handle = model._fallow
        for layer in handle.layers if not self.same_order else ():
            back = torch.argsort(layer.ids)
            for where in layer.view.parameters_along_channels():
                index = torch.cat([back + s * layer.view.n_channels for s in range(where.segments)])
                found[where.name] = found[where.name].index_select(where.dim, index)
        return found

    def choice(self, handle: Any) -> list[torch.Tensor]:
        """What the method chose, layer by layer."""
        if self.sparse_weights:
            return [x.mask() for x in handle.layers]
        if self.gated_only:
            return [t.clone() for x in handle.layers for t in (*x.predictor.buffers(), torch.tensor(x.keep))]
        return [x.kept.clone() for x in handle.ffns] if self.same_order else [x.ids.clone() for x in handle.layers]


def sat_reference(handle: Any, stock: nn.Module) -> AbstractContextManager:
    """Masks on the inputs of the down and output projections of a stock model."""
    views = anatomy.inspect(stock)
    stack = ExitStack()

    def mask_input(weight: str, kept: torch.Tensor, n: int) -> None:
        mask = torch.zeros(n, dtype=torch.bool)
        mask[kept] = True
        module = stock.get_submodule(weight.removesuffix(".weight"))

        def hook(_module: nn.Module, args: tuple) -> tuple:
            return (torch.where(mask, args[0], 0), *args[1:])

        stack.callback(module.register_forward_pre_hook(hook).remove)

    for sparse, view in zip(handle.ffns, views.ffns, strict=True):
        mask_input(view.parameters_along_channels()[-1].name, sparse.kept, view.n_channels)
    for sparse, view in zip(handle.attentions, views.attentions, strict=True):
        q_heads, _ = sparse.heads(sparse.kept)
        columns = (q_heads[:, None] * view.head_dim + torch.arange(view.head_dim)).flatten()
        mask_input(view.parameters_along_heads()[-1].name, columns, view.n_heads * view.head_dim)
    return stack


def sat_weight_grad_reference(handle: Any, stock: nn.Module) -> AbstractContextManager:
    """Masks on the gradients of a stock model's channel parameters."""
    stack = ExitStack()
    for sparse, view in zip(handle.ffns, anatomy.inspect(stock).ffns, strict=True):
        for where in view.parameters_along_channels():
            kept = torch.cat([sparse.kept + s * view.n_channels for s in range(where.segments)])
            shape = [-1 if d == where.dim else 1 for d in range(where.parameter.dim())]
            mask = torch.zeros(where.parameter.shape[where.dim]).index_fill(0, kept, 1).view(shape)
            stack.callback(where.parameter.register_hook(lambda grad, mask=mask: grad * mask).remove)
    return stack


def smet_reference(handle: Any, stock: nn.Module) -> AbstractContextManager:
    """A stock model with zeros in the dead weights, and masks on their gradients."""
    stack = ExitStack()
    for sparse, view in zip(handle.layers, anatomy.inspect(stock).linears, strict=True):
        side = sparse.out_features // sparse.grid[0]
        mask = sparse.mask().repeat_interleave(side, 0).repeat_interleave(side, 1)
        with torch.no_grad():
            view.weight().mul_(mask)
        stored = mask.t() if isinstance(view.module, Conv1D) else mask
        hook = view.module.weight.register_hook(lambda grad, mask=stored: grad * mask)
        stack.callback(hook.remove)
    return stack


def ssd_reference(handle: Any, stock: nn.Module) -> AbstractContextManager:
    """Per token, masks on the input of a stock model's down projections, with the coefficient 1 + p - stopgrad(p)."""
    stack = ExitStack()
    for sparse, view in zip(handle.layers, anatomy.inspect(stock).ffns, strict=True):
        expert_F = torch.argsort(sparse.ids) // (view.n_channels // sparse.n_experts)
        down = stock.get_submodule(view.parameters_along_channels()[-1].name.removesuffix(".weight"))
        up = stock.get_submodule(view.parameters_along_channels()[0].name.rpartition(".")[0])
        seen: dict[str, torch.Tensor] = {}

        def note(_module: nn.Module, args: tuple, seen: dict = seen) -> None:
            seen["x"] = args[0]

        def mask(_module: nn.Module, args: tuple, seen: dict = seen, sparse: Any = sparse, e: Any = expert_F) -> tuple:
            x = seen["x"].reshape(-1, seen["x"].shape[-1])
            logits = x @ sparse.router.detach().t()
            top = logits.topk(sparse.active, dim=1)
            p = top.values.softmax(1) if sparse.active > 1 else logits.softmax(1).gather(1, top.indices)
            weight_TE = torch.zeros(x.shape[0], sparse.n_experts).scatter(1, top.indices, 1 + p - p.detach())
            return (args[0] * weight_TE[:, e].view(args[0].shape), *args[1:])

        stack.callback(up.register_forward_pre_hook(note).remove)
        stack.callback(down.register_forward_pre_hook(mask).remove)
    return stack


def upcycle_reference(handle: Any, stock: nn.Module) -> AbstractContextManager:
    """Multipliers on the input of a stock model's down projections, by scores written out here."""
    stack = ExitStack()
    for sparse, view in zip(handle.layers, anatomy.inspect(stock).ffns, strict=True):
        down = stock.get_submodule(view.parameters_along_channels()[-1].name.removesuffix(".weight"))
        up = stock.get_submodule(view.parameters_along_channels()[0].name.rpartition(".")[0])
        seen: dict[str, torch.Tensor] = {}

        def note(_module: nn.Module, args: tuple, seen: dict = seen) -> None:
            seen["x"] = args[0]

        def gate(_module: nn.Module, args: tuple, seen: dict = seen, sparse: Any = sparse, view: Any = view) -> tuple:
            x, p = seen["x"], sparse.predictor
            if p.kind == "linear":
                scores = x @ p.v_RD.detach().t() @ p.u_FR.detach().t() + p.tilt_F
            else:
                w = view.weights()
                halves = [x @ _four_bits(m.detach()).t() for m in (w.w_gate_FD, w.w_up_FD)]
                scores = (activation(halves[0], view.act) * halves[1]).abs().detach()
            banked = scores.unflatten(-1, (-1, sparse.bank))
            live = torch.zeros_like(banked).scatter(-1, banked.topk(sparse.keep).indices, 1.0).flatten(-2)
            times = live * 2 * scores.sigmoid() if sparse.config.gate == "smooth" else live
            return (args[0] * times, *args[1:])

        stack.callback(up.register_forward_pre_hook(note).remove)
        stack.callback(down.register_forward_pre_hook(gate).remove)
    return stack


def _four_bits(w_FD: torch.Tensor) -> torch.Tensor:
    """16 levels without a zero per row (one group of 32), scales in bf16."""
    scale = (w_FD.abs().amax(1, keepdim=True) / 7.5).to(torch.bfloat16).float()
    return ((w_FD / scale + 7.5).round().clamp(0, 15) - 7.5) * scale


def smet(**settings: Any) -> Any:
    return SMET(update_every=2, lr_exponent=0, **settings)


ROWS = (
    Row(
        "sat",
        lambda: SAT(omit=0.5, heads=0.5, omit_in="forward+backward", ladder=0, refresh_every=2, sample_tokens=4096),
        lambda: SAT(omit=0.0, heads=0.0, omit_in="forward+backward"),
        sat_reference,
    ),
    Row(
        "sat-query-heads-sampled",
        lambda: SAT(
            omit=0.3,
            heads=0.5,
            head_unit="query",
            selection="sample",
            omit_in="forward+backward",
            ladder=0,
            sample_tokens=4096,
        ),
        lambda: SAT(omit=0.0, heads=0.0, head_unit="query"),
        sat_reference,
    ),
    Row(
        "sat-weight-grad",
        lambda: SAT(omit=0.5, heads=0.0, omit_in="weight_grad", ladder=0, refresh_every=2, sample_tokens=4096),
        lambda: SAT(omit=0.0, heads=0.0, omit_in="weight_grad"),
        sat_weight_grad_reference,
        exact_loss=True,
    ),
    Row("smet", lambda: smet(density=0.25), lambda: smet(density=1.0), smet_reference, sparse_weights=True),
    Row(
        "smet-unstructured-gradient",
        lambda: smet(density=0.3, structure="unstructured", distribution="erk", growth="gradient"),
        lambda: smet(density=1.0, structure="unstructured"),
        smet_reference,
        sparse_weights=True,
    ),
    Row(
        "smet-block",
        lambda: smet(density=0.5, block=16),
        lambda: smet(density=1.0, block=16),
        smet_reference,
        exact_zero=False,
        sparse_weights=True,
    ),
    Row(
        "ssd",
        lambda: SSD(experts=4, active=1, schedule="always_sparse", relu="ignore"),
        lambda: SSD(experts=4, active=4, schedule="always_sparse", relu="ignore"),
        ssd_reference,
        exact_zero=False,
        same_order=False,
        per_token=True,
    ),
    Row(
        "ssd-switching",
        lambda: SSD(
            experts=8,
            active=3,
            schedule="fixed",
            dense_start=0,
            sparse_share=0.25,
            dense_share=0.1,
            monitor_every=1,
            cluster_by="activations",
            relu="ignore",
        ),
        lambda: SSD(experts=8, active=8, schedule="fixed", dense_start=0, relu="ignore"),
        ssd_reference,
        exact_zero=False,
        same_order=False,
        per_token=True,
    ),
    Row(
        "upcycle",
        lambda: Upcycle(bank=16, keep=4, predictor="quantized", group=32, gate="hard"),
        lambda: Upcycle(bank=16, keep=16, predictor="quantized", group=32, gate="hard"),
        upcycle_reference,
        exact_zero=False,
        per_token=True,
        gated_only=True,
    ),
    Row(
        "upcycle-linear-smooth",
        lambda: Upcycle(bank=16, keep=2, predictor="linear", rank=8, gate="smooth", compensation=4),
        lambda: Upcycle(bank=16, keep=16, predictor="linear", rank=8, gate="hard", compensation=4),
        upcycle_reference,
        exact_zero=False,
        per_token=True,
        gated_only=True,
    ),
)
BEYOND = (
    Row(
        "upcycle-self",
        lambda: Upcycle(bank=16, keep=4, group=32, compensation=4, distill=1.0, teacher="self"),
        lambda: Upcycle(bank=16, keep=16, group=32, compensation=4, distill=1.0, teacher="self"),
        upcycle_reference,
        exact_zero=False,
        per_token=True,
        gated_only=True,
    ),
)
"""Settings whose training loss no masked stock model has: tests that compare with none run on them too."""
EVERY = (*ROWS, *BEYOND)
