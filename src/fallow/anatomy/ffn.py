"""`FFNView`: one FFN of a model, of whatever family, as `act(x Wgᵀ) ∘ (x Wuᵀ)` times `Wdᵀ`, or without the gate.

The view reads weights when asked, never keeps them: under FSDP2 a module's attributes become other tensors inside
forward. `install(forward)` swaps the FFN for a `Slot`; where the family spreads the FFN over the decoder layer (OPT),
three slots take the places of its parts. What the FFN module applies to its output (GPT-2's dropout) stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fallow.anatomy.families import FFNLayout, activation_name
from fallow.anatomy.int8 import Int8Linear
from fallow.anatomy.linear import (
    Linear,
    as_linear,
    out_dim,
    output_parameters,
    shape_OI,
    weight_OI,
    weight_parameter,
)
from fallow.anatomy.slot import PassThrough, Slot
from fallow.errors import ConfigError, UnsupportedModelError
from fallow.ops.bank_ffn import Weight

Forward = Callable[[Tensor], Tensor]


class FFNWeights(NamedTuple):
    """Weights of one FFN as [out, in] views; gradients flow through them. None: the family has no such tensor."""

    w_gate_FD: Tensor | None
    w_up_FD: Tensor
    w_down_DF: Tensor
    b_gate_F: Tensor | None
    b_up_F: Tensor | None
    b_down_D: Tensor | None


class FFNRows(NamedTuple):
    """The same as they are stored, a row per channel: tensors, or `Int8Rows` after `put_int8`."""

    w_gate_FD: Weight | None
    w_up_FD: Weight
    w_down_FD: Weight
    b_gate_F: Tensor | None
    b_up_F: Tensor | None
    b_down_D: Tensor | None


class ChannelParam(NamedTuple):
    """A parameter with a dimension along which FFN channels lie."""

    name: str
    """Dotted name in the model."""
    parameter: nn.Parameter
    dim: int
    segments: int
    """How many runs of F channels lie along `dim`, one after the other: 2 in Phi-3's fused gate-up, else 1."""


class _FFNSlot(Slot):
    """In the place of an FFN module: the given forward, then what the family applies to the FFN's output."""

    _slot_forward: Forward

    def __init__(self, stock: nn.Module, name: str, forward: Forward, after: tuple[str, ...]) -> None:
        super().__init__(stock, name)
        # Past nn.Module.__setattr__, which would register a module given as `forward` as a child.
        object.__setattr__(self, "_slot_forward", forward)
        self._slot_after = after

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = self._slot_forward(x_BTD)
        for name in self._slot_after:
            y_BTD = getattr(self, name)(y_BTD)
        return y_BTD


class _InlineSlot(Slot):
    """In the place of OPT's `fc1`, which sees [B·T, D]: restores [B, T, D] for the given forward."""

    _slot_forward: Forward

    def __init__(self, stock: nn.Module, name: str, forward: Forward, layer: nn.Module) -> None:
        super().__init__(stock, name)
        object.__setattr__(self, "_slot_forward", forward)
        self._slot_leading: torch.Size | None = None
        self._slot_hook = layer.register_forward_pre_hook(self._note_shape, with_kwargs=True)

    def _note_shape(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._slot_leading = hidden.shape[:-1]

    def forward(self, x_ND: Tensor) -> Tensor:
        leading = x_ND.shape[:-1] if self._slot_leading is None else self._slot_leading
        return self._slot_forward(x_ND.reshape(*leading, x_ND.shape[-1])).reshape(x_ND.shape)

    def remove(self) -> None:
        self._slot_hook.remove()
        super().remove()


class FFNView:
    """One FFN. Attributes:

    name: dotted name of the FFN module, or of the decoder layer where the FFN has no module of its own (OPT).
    layer: index of the decoder layer.
    kind: "gated" or "plain" (two matrices).
    act: "silu", "gelu", "gelu_tanh", "relu" or "relu2" (its square).
    n_channels, d_model: F and D.
    """

    def __init__(self, *, name: str, layer: int, holder: nn.Module, decoder_layer: nn.Module, layout: FFNLayout):
        """`holder` is the module whose children `layout` names: the FFN, or the decoder layer."""
        self.name, self.layer = name, layer
        self._holder, self._decoder_layer, self._layout = holder, decoder_layer, layout
        self._slots: list[Slot] = []
        self.kind: Literal["gated", "plain"] = "gated" if layout.gate or layout.fused else "plain"
        act = activation_name(holder.get_submodule(layout.act))
        if act is None:
            raise UnsupportedModelError(
                f"{name}.{layout.act} is a {type(holder.get_submodule(layout.act)).__name__}; fallow computes silu, "
                "gelu, gelu_tanh, relu and relu2: add it to ACTIVATIONS in anatomy/families.py and to ops/activation.py"
            )
        self.act = act
        self.d_model, self.n_channels = shape_OI(self._part(layout.down))
        rows = self.n_channels * (2 if layout.fused else 1)
        for part in (p for p in (layout.gate, layout.up) if p):
            if (shape := shape_OI(self._part(part))) != (rows, self.d_model):
                raise UnsupportedModelError(
                    f"{name}.{part} is {shape}, not {(rows, self.d_model)} as its "
                    "down projection asks for; this is not the FFN that anatomy/families.py describes"
                )

    def _part(self, part: str) -> Linear:
        module = self._holder._modules[part]
        if isinstance(module, Slot):
            module = module.stock
        return as_linear(cast(nn.Module, module), self.name, part)

    def weights(self) -> FFNWeights:
        """The weights as they are in the modules now."""
        layout = self._layout
        up, down = self._part(layout.up), self._part(layout.down)
        w_up, b_up = weight_OI(up), up.bias
        w_gate, b_gate = None, None
        if layout.gate:
            gate = self._part(layout.gate)
            w_gate, b_gate = weight_OI(gate), gate.bias
        elif layout.fused:
            F = self.n_channels
            w_gate, w_up = w_up[:F], w_up[F:]
            if b_up is not None:
                b_gate, b_up = b_up[:F], b_up[F:]
        return FFNWeights(w_gate, w_up, weight_OI(down), b_gate, b_up, down.bias)

    def rows(self) -> FFNRows:
        """The weights as they are in the modules now, never copied."""
        layout, F = self._layout, self.n_channels
        up, down = self._part(layout.up), self._part(layout.down)
        if not isinstance(up, Int8Linear) or not isinstance(down, Int8Linear):
            w = self.weights()
            return FFNRows(w.w_gate_FD, w.w_up_FD, w.w_down_DF.t(), *w[3:])
        w_gate, w_up, b_gate, b_up = None, up.rows(), None, up.bias
        if layout.gate:
            gate = cast(Int8Linear, self._part(layout.gate))
            w_gate, b_gate = gate.rows(), gate.bias
        elif layout.fused:
            w_gate, w_up = up.rows(0, F), up.rows(F)
            if b_up is not None:
                b_gate, b_up = b_up[:F], b_up[F:]
        return FFNRows(w_gate, w_up, down.rows(), b_gate, b_up, down.bias)

    def parameters_along_channels(self) -> list[ChannelParam]:
        """Every parameter of which a channel owns rows, columns or entries; not the down projection's bias."""
        layout, found = self._layout, []
        for part in (p for p in (layout.gate, layout.up) if p):
            for name, parameter, dim in output_parameters(self._part(part)):
                segments = 2 if layout.fused else 1
                found.append(ChannelParam(f"{self.name}.{part}.{name}", parameter, dim, segments))
        down = self._part(layout.down)
        found.append(ChannelParam(f"{self.name}.{layout.down}.weight", weight_parameter(down), 1 - out_dim(down), 1))
        return found

    def dense(self, x_BTD: Tensor) -> Tensor:
        """The stock FFN, computed by its stock modules bit for bit, without what follows it (dropout). Ours."""
        layout = self._layout
        if layout.gate:
            # Gate before up, as stock code has it: autograd adds their input gradients in that order.
            h = self._run(layout.act, self._run(layout.gate, x_BTD)) * self._run(layout.up, x_BTD)
        elif layout.fused:
            gate, up = self._run(layout.up, x_BTD).chunk(2, dim=-1)
            h = up * self._run(layout.act, gate)
        else:
            h = self._run(layout.act, self._run(layout.up, x_BTD))
        return self._run(layout.down, h)

    def _run(self, part: str, x: Tensor) -> Tensor:
        module = self._holder._modules[part]
        # A slot has fired the hooks it shares with its stock module already, so only the stock computation is run.
        return module.stock.forward(x) if isinstance(module, Slot) else cast(nn.Module, module)(x)

    def put_relu(self) -> None:
        """ReLU in the place of the activation module, for good: ReGLU of a SwiGLU, the first step of ReLU-fication."""
        if self._slots:
            raise ConfigError(f"{self.name} has a forward installed; call uninstall() before its activation is changed")
        self._holder.set_submodule(self._layout.act, nn.ReLU())
        self.act = "relu"

    def put_int8(self) -> None:
        """Its weights in 8 bits, for good: `Int8Linear` in the places of its linear layers."""
        if self._slots:
            raise ConfigError(f"{self.name} has a forward installed; call uninstall() before its weights are rounded")
        layout = self._layout
        for part in (p for p in (layout.gate, layout.up, layout.down) if p):
            stock = self._part(part)
            if not isinstance(stock, nn.Linear):
                raise UnsupportedModelError(f"{self.name}.{part} is a {type(stock).__name__}; int8 needs a Linear")
            self._holder.set_submodule(part, Int8Linear(stock, along_inputs=part == layout.down))

    @property
    def decoder_layer(self) -> nn.Module:
        """The decoder layer that holds it."""
        return self._decoder_layer

    @property
    def installed(self) -> bool:
        return bool(self._slots)

    def install(self, forward: Forward) -> None:
        """From now on the model computes `forward(x_BTD) -> y_BTD` where its FFN was; parameters stay where they are.

        Raises:
            ConfigError: installed already. UnsupportedModelError: something else replaced the FFN's forward.
        """
        if self._slots:
            raise ConfigError(f"{self.name} has a forward installed already; call uninstall() first")
        layout, layer = self._layout, self._decoder_layer
        if layout.path:
            slots: list[tuple[Slot, str]] = [
                (_FFNSlot(self._holder, self.name, forward, layout.after), layout.path),
            ]
        else:
            stock = {part: cast(nn.Module, layer._modules[part]) for part in (layout.up, layout.act, layout.down)}
            names = {part: f"{self.name}.{part}" for part in stock}
            slots = [(PassThrough(stock[p], names[p]), p) for p in (layout.act, layout.down)]
            slots.append((_InlineSlot(stock[layout.up], names[layout.up], forward, layer), layout.up))
        for slot, child in slots:
            slot.place(layer, child)
        self._slots = [slot for slot, _ in slots]

    def uninstall(self) -> None:
        """Put the very same stock modules back. Does nothing when nothing is installed."""
        for slot in self._slots:
            slot.remove()
        self._slots = []
