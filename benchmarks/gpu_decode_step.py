"""One decoding step of a Llama for benchmarks/gpu_upcycle_decode.py, compiled in parts and captured as a CUDA graph.

What comes before the layers, a layer, and what comes after are compiled once each: a layer sees its own tensors only,
so that one compiled layer serves all of them. Compiling the whole step takes minutes for 28 layers and buys nothing
that a CUDA graph of the parts has not. FFNs are whatever stands in the model: stock, or Upcycle's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_timing import fused_products

if TYPE_CHECKING:
    from torch import Tensor

    from fallow.serving import Decoder

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
    import torch

    x = model.model.embed_tokens(token_11)
    mask = (torch.arange(places, device=x.device) <= position_1)[None, None, None]
    return x, mask, *model.model.rotary_emb(x, position_ids=position_1[None])


def layer(
    module: Any, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position_1: Tensor
) -> Tensor:
    cache = _Places(keys, values, position_1)
    return module.forward(x, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=cache)


def layer_merged(
    module: Any, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position_1: Tensor
) -> Tensor:
    """`layer` of a Llama with `one_query`, and one product for query, key and value (`merge`)."""
    import torch.nn.functional as F
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    a, G, d = module.self_attn, keys.shape[1], keys.shape[3]
    q, k, v = (
        F.linear(module.input_layernorm(x), a.merged)
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


def merge(model: Any) -> None:
    """Lay a copy of query's, key's and value's weights of every layer together, where that has not been done."""
    import torch

    for module in model.model.layers:
        a = module.self_attn
        if not hasattr(a, "merged"):
            if any(p.bias is not None for p in (a.q_proj, a.k_proj, a.v_proj)):
                raise RuntimeError("products with a bias are not merged")
            a.merged = torch.cat([p.weight.detach() for p in (a.q_proj, a.k_proj, a.v_proj)])


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
    import torch

    H, d, G = query.shape[1], query.shape[3], key.shape[1]
    q = query.reshape(G, H // G, 1, d).float()
    score = (q * key[0, :, None].float()).sum(-1) * scaling
    share = torch.where(attention_mask[0, 0], score, -torch.inf).softmax(-1)
    y = (share[..., None] * value[0, :, None].float()).sum(2)
    return y.to(query.dtype).reshape(1, 1, H, d), None


def parts(*, attention: str = "stock", compiled: bool = True, fused: bool = False, merged: bool = False) -> Parts:
    """The three parts. `fused`: products of one row are Inductor's own kernels in place of cuBLAS's. `merged`: query,
    key and value are one product, of weights that `merge` has laid together."""
    import torch
    from transformers import AttentionInterface

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
    torch._dynamo.config.recompile_limit = 64  # one entry for every model and way, not for every layer
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if fused:
        how["backend"] = fused_products
    return Parts(*(under_attention(torch.compile(f, **how)) for f in functions))


def step_of(decoder: Decoder, through: Parts, token_11: Tensor, position_1: Tensor) -> Callable[[], Tensor]:
    """A step that reads `token_11` at `position_1` of the decoder's cache and counts the position on. Its prompt must
    have been read, and one token by the stock step, in which layers make what they derive from weights."""
    import torch

    model: Any = decoder.model
    # Fresh views: transformers marks its own tensors as ones whose addresses compiled code may hold.
    cache: Any = decoder._cache
    caches = [(c.keys.detach(), c.values.detach()) for c in cache.layers]

    @torch.no_grad()
    def step() -> Tensor:
        x, *common = through.before(model, token_11, position_1, decoder.max_tokens)
        for module, (keys, values) in zip(model.model.layers, caches, strict=True):
            x = through.layer(module, x, *common, keys, values, position_1)
        logits_V = through.after(model, x)
        position_1.add_(1)
        return logits_V

    return step
