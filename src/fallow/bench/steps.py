"""What the step benchmarks of all methods share: the shapes, a stock model of each, and one training step of a form.

A step is zero_grad, forward, backward and the optimizer's step, on 2,048 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from fallow.bench.flops import Shape
from fallow.ops import attention as fast_attention
from fallow.ops.cross_entropy import causal_lm_loss


@dataclass(slots=True, frozen=True)
class Case:
    name: str
    shape: Shape
    sequences: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len

    def ids(self) -> torch.Tensor:
        """int64 [sequences, seq_len], always the same."""
        g = torch.Generator().manual_seed(1)
        return torch.randint(0, self.shape.vocab or 256, (self.sequences, self.seq_len), generator=g)


CASES = {
    c.name: c
    for c in (
        Case("smollm2-135m", Shape(576, 1536, 9, 3, 64, layers=30, vocab=49152), 4, 512),
        Case("1b-layer", Shape(2048, 5632, 32, 4, 64, layers=1), 1, 2048),
        Case("7b-layer", Shape(4096, 11008, 32, 32, 128, layers=1), 1, 2048),
        Case("8b-layer", Shape(4096, 14336, 32, 8, 128, layers=1), 1, 2048),
    )
}


def build(case: Case, dtype: torch.dtype, *, act: str = "silu") -> PreTrainedModel:
    """A stock transformers Llama of the case's widths with random weights; without a head when `vocab` is 0."""
    s = case.shape
    config = LlamaConfig(
        hidden_size=s.d_model,
        intermediate_size=s.ffn,
        hidden_act=act,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        num_hidden_layers=s.layers,
        vocab_size=s.vocab or 256,
        max_position_embeddings=max(2048, case.seq_len),
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaForCausalLM(config) if s.vocab else LlamaModel(config)
    finally:
        torch.set_default_dtype(before)
    model.train()
    if s.vocab:
        model.loss_function = causal_lm_loss
    return model


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.layers if hasattr(model, "model") else model.layers  # type: ignore[return-value]


@dataclass(slots=True, kw_only=True)
class Form:
    """One way to do the step. Forms that differ in their attention alone share a model: six of 3 GB do not fit."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    ids: torch.Tensor
    fast: bool
    handle: Any = None
    selection_seconds: float = 0.0
    steps: int = 0

    def prepare(self) -> None:
        (fast_attention.enable if self.fast else fast_attention.disable)(self.model)

    def step(self) -> None:
        before = self._selection()
        if self.handle is not None:
            self.handle.before_step(self.steps, 1 << 30)
        self.optimizer.zero_grad()
        if hasattr(self.model, "lm_head"):
            self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        else:
            # the gradient a layer gets from the one above it; a loss of our own would weigh on one layer as on thirty
            y_BTD = self.model(input_ids=self.ids).last_hidden_state
            y_BTD.backward(gradient=torch.full((), 1e-3, dtype=y_BTD.dtype).expand_as(y_BTD))
        self.optimizer.step()
        if self.handle is not None:
            self.handle.after_step(self.steps, 1 << 30)
        self.steps += 1
        self.selection_seconds += self._selection() - before

    def _selection(self) -> float:
        return 0.0 if self.handle is None else self.handle.metrics().get("sat/selection_seconds", 0.0)
