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
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from fallow.anatomy.rotary import like_llama
from fallow.errors import ConfigError
from fallow.serving import layered
from fallow.serving.frames import with_room
from fallow.serving.graph import Rewritten, rewrite
from fallow.serving.sampling import Sampling, pick


@dataclass(slots=True, kw_only=True)
class Generated:
    """One text, and the time it took."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    """What was generated, the stop token included."""
    stopped: str = ""
    """"stop": by a stop token; "length": by `max_new_tokens`."""
    prefill_seconds: float = 0.0
    """Of the prompt and the first token."""
    compile_seconds: float = 0.0
    """Of the step that compiled, where this text was the first to need it."""
    decode_seconds: float = 0.0
    """Of the other tokens."""
    decoded: int = 0
    """How many tokens `decode_seconds` are for."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding; None where no token was timed."""
        return self.decoded / self.decode_seconds if self.decoded else None

    def count(self, seconds: float, *, compiling: bool) -> None:
        """One more token has come."""
        if not self.prefill_seconds:
            self.prefill_seconds = seconds
        elif compiling:
            self.compile_seconds += seconds
        else:
            self.decode_seconds += seconds
            self.decoded += 1


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
        self._unguarded: Callable[[], Tensor] | None = None
        self._compiling, self._first = False, True
        self._cache = _cache(model, max_tokens)
        self._token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._step: Callable[[Tensor], Tensor] | None = None
        self._handed: tuple[Callable[..., Any], tuple[Any, ...], Any] | None = None
        self._replay: layered.Replay | None = None
        if compiled and model.device.type == "cuda" and like_llama(model)[0]:
            self.note = "compiled by layer, in a CUDA graph"
            replay = self._replay = layered.Replay(model, self._cache, max_tokens)
            self._step = lambda token_11: replay(token_11, self.length)
        elif compiled:
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
            ConfigError: an empty prompt, more tokens than the cache has places for, or a model in training mode.
        """
        sampling = sampling or Sampling()
        stop = set(stop_tokens_of(self.model) if stop_tokens is None else stop_tokens)
        ids = [int(i) for i in prompt]
        if self.model.training:
            raise ConfigError("generate: the model is in training mode; call model.eval() first")
        if not ids or max_new_tokens < 1:
            raise ConfigError("generate: give a prompt of one token at least, and max_new_tokens of 1 at least")
        if len(ids) + max_new_tokens > self.max_tokens:
            raise ConfigError(
                f"generate: {len(ids)} prompt tokens and {max_new_tokens} new ones do not fit into the cache of"
                f" {self.max_tokens}; raise max_tokens, or shorten the prompt"
            )
        chance, tokens = sampling.generator(), list[int]()
        done = Generated(prompt_tokens=len(ids))
        began = time.perf_counter()
        logits_V = self.prefill(ids)
        while True:
            tokens.append(pick(logits_V, sampling, chance))
            done.count(time.perf_counter() - began, compiling=self._compiling)
            if on_token:
                on_token(tokens[-1])
            if tokens[-1] in stop or len(tokens) == max_new_tokens:
                break
            began, self._compiling = time.perf_counter(), False
            logits_V = self.step(tokens[-1])
        done.tokens, done.stopped = tokens, "stop" if tokens[-1] in stop else "length"
        return done

    @torch.no_grad()
    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Forget what was, read a prompt, and return the logits [V] of what comes next."""
        self._cache.reset()
        self._unguarded = self._handed = None
        if self._replay is not None:
            self._replay.forget()
        self._first, self.length = True, len(ids)
        out = self.model(
            input_ids=torch.tensor([list(ids)], device=self.model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[0, -1]

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Read one token, by its id, and return the logits [V] of what comes next.

        The first step after a prompt runs eagerly: layers then make what they derive from weights, which no graph may.

        Raises:
            ConfigError: the cache is full.
        """
        if self.length >= self.max_tokens:
            raise ConfigError(f"the cache is full with {self.length} tokens; make a Decoder with more max_tokens")
        self._token_11.fill_(token)
        run = self._eager if self._first or self._step is None else self._compiled_or_eager
        logits_V = with_room(run, self._token_11)
        self.length += 1
        self._first = False
        return logits_V

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens of the text. Raises ConfigError: there are not so many."""
        if not 0 < length <= self.length:
            raise ConfigError(f"rewind: length={length} must be 1 to the {self.length} tokens read so far")
        self.length = length
        for layer in self._cache.layers:
            if not isinstance(layer, StaticLayer):
                raise ConfigError(f"rewind: a {type(layer).__name__} cannot forget; prefill again")
            layer.cumulative_length.fill_(length)

    def _compiled_or_eager(self, token_11: Tensor) -> Tensor:
        """At its first call in a text Dynamo checks that model and mode are the graph's; later calls skip that."""
        if self._unguarded is not None:
            return self._unguarded()
        assert self._step is not None
        if self._replay is not None:
            self._compiling = not self._replay.ready
        try:
            logits_V = self._step(token_11)
            if self._handed is not None:
                compiled, arguments, outputs = self._handed
                if len(outputs) == 1 and outputs[0] is logits_V:
                    self._unguarded = lambda: compiled(*arguments)[0]
            return logits_V
        except Exception as error:  # whatever Dynamo, Inductor or a C++ compiler raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.note = f"eager: torch.compile failed with {type(error).__name__}: {' '.join(lines[:1])[:160]}"
            self._say(f"decoding falls back to {self.note}")
            self._step, self._compiling = None, True
            for layer in self._cache.layers:  # some of the graph may have run
                if isinstance(layer, StaticLayer):
                    layer.cumulative_length.fill_(self.length)
            return self._eager(token_11)

    def _eager(self, token_11: Tensor) -> Tensor:
        out = self.model(input_ids=token_11, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]

    def _backend(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self._compiling = True
        if not self._rewriting:
            return compile_fx(graph, inputs)
        self.rewritten = rewrite(graph)
        # What is left between our kernels takes 1 to 10 µs: less than a parallel region.
        compiled: Any = compile_fx(graph, inputs, config_patches={"cpp.threads": 1})

        def run(*arguments: Any) -> Any:
            outputs = compiled(*arguments)
            self._handed = (compiled, arguments, outputs)
            return outputs

        return run


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
