"""A decoding step on a GPU: compiled in parts, and replayed as one CUDA graph.

What comes before the layers, a layer, and what comes after are compiled once each: a layer sees its own tensors only,
so that one compiled layer serves all of them. Compiling the whole step takes minutes for 28 layers and buys nothing
that a CUDA graph of the parts has not. FFNs are whatever stands in the model: stock, or a method's. Query, key and
value are one product where they have no bias. On an H200, 7B shape: 4.7 ms a token, where transformers' own step in a
graph takes 7.2; with Upcycle 2.7 and 5.1 (benchmarks/gpu_upcycle_decode.py). What ran there are the parts of a Llama;
`Replay` and the other families (anatomy/rotary.py) have run on CPUs only. Ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from fallow.anatomy.rotary import apply_rotary_pos_emb, plain_projections

ONE_QUERY = "fallow_one_query"
"""The name under which transformers finds `one_query`."""


class Parts(NamedTuple):
    """(model, token_11, position_1, places) -> (x, mask, cos, sin), one layer, and (model, x) -> logits [V]."""

    before: Callable[..., Any]
    layer: Callable[..., Any]
    after: Callable[..., Any]


class _Places:
    """The cache of one layer, as that layer's attention sees a cache."""

    def __init__(self, keys: Tensor, values: Tensor, position_1: Tensor) -> None:
        self.keys, self.values, self.position_1 = keys, values, position_1

    def update(self, keys: Tensor, values: Tensor, *_args: object, **_more: object) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.position_1, keys)
        self.values.index_copy_(2, self.position_1, values)
        return self.keys, self.values


def before(model: Any, token_11: Tensor, position_1: Tensor, places: int) -> tuple[Tensor, ...]:
    x = model.model.embed_tokens(token_11)
    mask = (torch.arange(places, device=x.device) <= position_1)[None, None, None]
    return x, mask, *model.model.rotary_emb(x, position_ids=position_1[None])


def layer(
    module: Any, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position_1: Tensor
) -> Tensor:
    cache = _Places(keys, values, position_1)
    return module.forward(x, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=cache)


def layer_merged(
    module: Any,
    x: Tensor,
    mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position_1: Tensor,
    merged_HD: Tensor,
) -> Tensor:
    """`layer` of a Llama with `one_query`, and one product for query, key and value (`merge`)."""
    a, G, d = module.self_attn, keys.shape[1], keys.shape[3]
    q, k, v = (
        F.linear(module.input_layernorm(x), merged_HD)
        .unflatten(2, (-1, d))
        .transpose(1, 2)
        .tensor_split((-2 * G, -G), 1)
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    keys.index_copy_(2, position_1, k)
    values.index_copy_(2, position_1, v)
    y, _ = one_query(a, q, keys, values, mask, scaling=a.scaling)
    x = x + a.o_proj(y.flatten(2))
    return x + module.mlp(module.post_attention_layernorm(x))


@torch.no_grad()
def merge(model: Any) -> list[Tensor]:
    """A copy of query's, key's and value's weights of every layer, laid together, as they are now."""
    attentions = [module.self_attn for module in model.model.layers]
    return [torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]) for a in attentions]


def after(model: Any, x: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(x))[0, -1]


def one_query(
    _module: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    **_more: object,
) -> tuple[Tensor, None]:
    """Attention of one query as sums that Inductor fuses: no copy of keys and values for every query head, which the
    stock form makes where there is a mask."""
    H, d, G = query.shape[1], query.shape[3], key.shape[1]
    q = query.reshape(G, H // G, 1, d).float()
    score = (q * key[0, :, None].float()).sum(-1) * scaling
    share = torch.where(attention_mask[0, 0], score, -torch.inf).softmax(-1)
    y = (share[..., None] * value[0, :, None].float()).sum(2)
    return y.to(query.dtype).reshape(1, 1, H, d), None


def parts(
    *, attention: str = "stock", compiled: bool = True, merged: bool = False, backend: Callable[..., Any] | None = None
) -> Parts:
    """The three parts. `merged`: query, key and value are one product, of what `merge` returns.
    `backend`: of torch.compile, in place of its own."""
    AttentionInterface.register(ONE_QUERY, one_query)

    def under_attention(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: Any, *arguments: Any) -> Any:
            config = model.config if hasattr(model, "config") else model.self_attn.config
            stock = config._attn_implementation
            config._attn_implementation = stock if attention == "stock" else ONE_QUERY
            try:
                return function(model, *arguments)
            finally:
                config._attn_implementation = stock

        return call

    functions = before, layer_merged if merged else layer, after
    if not compiled:
        return Parts(*(under_attention(f) for f in functions))
    limit = torch._dynamo.config.recompile_limit  # one entry for every model and way, not for every layer
    torch._dynamo.config.recompile_limit = max(64, limit)
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False} | ({"backend": backend} if backend else {})
    return Parts(*(under_attention(torch.compile(f, **how)) for f in functions))


def step_of(
    model: Any,
    cache: Any,
    places: int,
    through: Parts,
    token_11: Tensor,
    position_1: Tensor,
    merged: list[Tensor] | None = None,
) -> Callable[[], Tensor]:
    """A step that reads `token_11` at `position_1` of a static cache and returns the logits [V]. The prompt must have
    been read, and one token by the stock step, in which layers make what they derive from weights. `merged`: what
    `merge` returned, for parts that want it."""
    # Fresh views: transformers marks its own tensors as ones whose addresses compiled code may hold.
    own = [(c.keys.detach(), c.values.detach(), position_1) for c in cache.layers]
    if merged is not None:
        own = [(*tensors, weights) for tensors, weights in zip(own, merged, strict=True)]

    @torch.no_grad()
    def step() -> Tensor:
        x, *common = through.before(model, token_11, position_1, places)
        for module, tensors in zip(model.model.layers, own, strict=True):
            x = through.layer(module, x, *common, *tensors)
        return through.after(model, x)

    return step


class Replay:
    """The step of one model (`anatomy.rotary.like_llama`) and cache: compiled and captured in the first call of a text,
    replayed in the others.

    A graph holds the addresses of weights and of what layers derive from them, which may change between texts: so it is
    captured anew after `forget`, in some tenths of a second. Where there is no GPU the parts are called one by one.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, places: int, *, compiled: bool = True) -> None:
        self.model, self.cache, self.places = model, cache, places
        self.position_1 = torch.zeros(1, dtype=torch.long, device=model.device)
        self.merged = plain_projections(model)
        self._parts = parts(attention=ONE_QUERY, compiled=compiled, merged=self.merged)
        self._replay: Callable[[], Tensor] | None = None

    @property
    def ready(self) -> bool:
        """Whether the next call is a replay."""
        return self._replay is not None

    def forget(self) -> None:
        """A new text begins, and whatever is derived from weights may be elsewhere."""
        self._replay = None

    def __call__(self, token_11: Tensor, position: int) -> Tensor:
        """Logits [V] of what follows `token_11` (always the same tensor in a text), the text's token at `position`."""
        self.position_1.fill_(position)
        if self._replay is None:
            merged = merge(self.model) if self.merged else None
            step = step_of(self.model, self.cache, self.places, self._parts, token_11, self.position_1, merged)
            self._replay = captured(step) if self.model.device.type == "cuda" else step
        return self._replay()


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph; compiling and tuning come first. Its result is overwritten by the next replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
