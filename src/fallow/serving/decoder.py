"""`Decoder`: one text at a time, token by token, with a cache of fixed size and the step as one compiled graph.

Works with any causal language model of transformers, dense or with a method's handle in either mode. The obvious
alternative, `model.generate()`, spends some 0.5 ms of Python per layer and token and grows its cache by copying it:
of a 135M model's token that is most of the time, and hides what sparsity saves. What is left here per layer and token
is a handful of calls. On CPUs linears and attention are kernels for a single token (graph.py), dense and sparse alike.

Cost of the first text: the compilation, 5 to 60 s. A step that does not compile runs eagerly, and a line says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from fallow.errors import ConfigError
from fallow.serving.graph import Rewritten, rewrite
from fallow.serving.sampling import Sampling, pick


@dataclass(slots=True)
class Generated:
    """One text, and the time it took."""

    tokens: list[int]
    """What was generated, the stop token included."""
    stopped: str
    """"stop": by a stop token; "length": by `max_new_tokens`."""
    prompt_tokens: int
    prefill_seconds: float
    """Of the prompt and the first token."""
    compile_seconds: float
    """Of compiling the step, where this text was the first to need it."""
    decode_seconds: float
    """Of the tokens after the first, without compilation."""
    decoded: int
    """How many tokens `decode_seconds` are for."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding; None where fewer than two tokens were timed."""
        return self.decoded / self.decode_seconds if self.decoded and self.decode_seconds else None


class Decoder:
    """A decoding loop for one model.

    Args:
        model: a causal language model; set a method's mode before each text as you like.
        max_tokens: places in the cache: prompt and new tokens together. Bytes: those of keys and values.
        compiled: False runs every step eagerly, as does a step that does not compile.
        rewriting: whether the kernels for a single token take the places of linears and attention.
        say: where a line goes when something falls back.

    Raises:
        ConfigError: `max_tokens` is below 2, or more than the model has positions for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_tokens: int = 1024,
        compiled: bool = True,
        rewriting: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if max_tokens < 2:
            raise ConfigError(f"max_tokens={max_tokens}: a prompt and a new token need 2 places at least")
        if limit is not None and max_tokens > limit:
            raise ConfigError(f"max_tokens={max_tokens} is beyond the {limit} positions of this model; lower it")
        self.model, self.max_tokens, self.length = model, max_tokens, 0
        self.rewritten: Rewritten | None = None
        self.note = "eager"
        self._rewriting, self._say = rewriting, say
        self._cache = _cache(model, max_tokens)
        self._token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._step: Callable[[Tensor], Tensor] | None = None
        if compiled:
            self.note = "compiled"
            on_cpu = model.device.type == "cpu"
            how: dict[str, Any] = {"backend": self._backend} if on_cpu else {"mode": "reduce-overhead"}
            self._step = torch.compile(_own_copy(self._eager), fullgraph=True, dynamic=False, **how)

    def generate(
        self,
        prompt: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_tokens: Collection[int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Generated:
        """Continue a prompt.

        Args:
            prompt: token ids, one at least.
            max_new_tokens: at most so many; the prompt and they must fit into the cache.
            sampling: None is greedy.
            stop_tokens: generation ends with any of them; None: those of the model's generation config.
            on_token: called with every token as soon as it is there.

        Raises:
            ConfigError: an empty prompt, or more tokens than the cache has places for.
        """
        sampling = sampling or Sampling()
        stop = set(stop_tokens_of(self.model) if stop_tokens is None else stop_tokens)
        ids = [int(i) for i in prompt]
        if not ids or max_new_tokens < 1:
            raise ConfigError("generate: give a prompt of one token at least, and max_new_tokens of 1 at least")
        if len(ids) + max_new_tokens > self.max_tokens:
            raise ConfigError(
                f"generate: {len(ids)} prompt tokens and {max_new_tokens} new ones do not fit into the cache of"
                f" {self.max_tokens}; raise max_tokens, or shorten the prompt"
            )
        chance = sampling.generator()
        tokens: list[int] = []
        marks = [time.perf_counter()]
        logits_V = self.prefill(ids)
        for _ in range(max_new_tokens):
            tokens.append(pick(logits_V, sampling, chance))
            marks.append(time.perf_counter())
            if on_token:
                on_token(tokens[-1])
            if tokens[-1] in stop or len(tokens) == max_new_tokens:
                break
            logits_V = self.step(tokens[-1], eagerly=len(tokens) == 1)
        return self._summary(ids, tokens, stop, marks)

    def _summary(self, ids: list[int], tokens: list[int], stop: set[int], marks: list[float]) -> Generated:
        spans = [b - a for a, b in pairwise(marks)]
        return Generated(
            tokens=tokens,
            stopped="stop" if tokens[-1] in stop else "length",
            prompt_tokens=len(ids),
            prefill_seconds=spans[0],
            compile_seconds=0.0,
            decode_seconds=sum(spans[1:]),
            decoded=len(spans) - 1,
        )

    @torch.no_grad()
    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Forget what was, read a prompt, and return the logits [V] of what comes next."""
        self._cache.reset()
        self.length = len(ids)
        out = self.model(
            input_ids=torch.tensor([list(ids)], device=self.model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[0, -1]

    @torch.no_grad()
    def step(self, token: int, *, eagerly: bool = False) -> Tensor:
        """Read one token and return the logits [V] of what comes next.

        Args:
            token: its id.
            eagerly: without the compiled graph. The first step of a text runs so, because layers then make what they
                derive from weights, which no graph may.

        Raises:
            ConfigError: the cache is full.
        """
        if self.length >= self.max_tokens:
            raise ConfigError(f"the cache is full with {self.length} tokens; make a Decoder with more max_tokens")
        self._token_11.fill_(token)
        run = self._eager if eagerly or self._step is None else self._compiled_or_eager
        logits_V = run(self._token_11)
        self.length += 1
        return logits_V

    def _compiled_or_eager(self, token_11: Tensor) -> Tensor:
        assert self._step is not None
        try:
            return self._step(token_11)
        except Exception as error:  # whatever Dynamo, Inductor or a C++ compiler raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.note = f"eager: torch.compile failed with {type(error).__name__}: {' '.join(lines[:1])[:160]}"
            self._say(f"decoding falls back to {self.note}")
            self._step = None
            for layer in self._cache.layers:  # some of the graph may have run
                if isinstance(layer, StaticLayer):
                    layer.cumulative_length.fill_(self.length)
            return self._eager(token_11)

    def _eager(self, token_11: Tensor) -> Tensor:
        out = self.model(input_ids=token_11, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]

    def _backend(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        if self._rewriting:
            self.rewritten = rewrite(graph)
        return compile_fx(graph, inputs)


def stop_tokens_of(model: PreTrainedModel) -> list[int]:
    """The ids with which a text of this model ends."""
    config = model.generation_config
    ends = config.eos_token_id if config is not None else None
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _own_copy(method: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same method with its own code object: Dynamo keeps at most eight graphs per code object, for all decoders."""
    stock: Any = method
    code = stock.__func__.__code__.replace()
    return FunctionType(code, stock.__globals__, code.co_name, stock.__defaults__, stock.__closure__).__get__(
        stock.__self__
    )


def _cache(model: PreTrainedModel, places: int) -> StaticCache:
    """A static cache that counts its tokens in tensors only.

    A sliding layer of transformers counts in a Python integer too, for which every step would be compiled anew. It has
    all places here; the mask says what the window shows, and closed places cost nothing.
    """
    cache = StaticCache(config=model.config, max_cache_len=places)
    cache.layers = [
        StaticLayer(max_cache_len=places) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache
