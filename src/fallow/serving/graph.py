"""The graph of one decoding step, rewritten before it is compiled: linears and attention of a single token.

    F.linear(x, W, b)                       -> row_linear; linears of the same x become one call
    attention(q, repeat(k), repeat(v), m)   -> row_attention; the repeats of keys and values for query heads go away

Works on what Dynamo captured, so on any model and on dense and sparse ones alike: no module is touched. Nodes that the
kernels do not serve stay as they are. The obvious alternative, replacing modules, needs to know every family's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fallow.ops import row_attention as attention_op
from fallow.ops import row_linear as linear_op


@dataclass(slots=True)
class Rewritten:
    """How many nodes were replaced, and how many of their kind stayed."""

    linears: int = 0
    linears_left: int = 0
    attentions: int = 0
    attentions_left: int = 0


def rewrite(graph: fx.GraphModule) -> Rewritten:
    """Replace in place what the kernels of this machine serve."""
    done = Rewritten()
    _rewrite_linears(graph.graph, done)
    _rewrite_attention(graph.graph, done)
    # Dead code stays: fx takes the in-place updates of the cache for dead, and the compiler knows better.
    graph.recompile()
    return done


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _arguments(node: fx.Node, names: tuple[str, ...]) -> list[Any]:
    """The arguments of a call by these names, given by place or by keyword; None where absent."""
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]


def _rewrite_linears(graph: fx.Graph, done: Rewritten) -> None:
    of_input: dict[fx.Node, list[tuple[fx.Node, fx.Node, fx.Node | None]]] = {}
    kernel = linear_op.cpu.available()[0]
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not F.linear:
            continue
        x, w, b = _arguments(node, ("input", "weight", "bias"))
        values = [_value(x), _value(w), _value(b)]
        fits = all(isinstance(v, Tensor) for v in values[:2]) and (b is None) == (values[2] is None)
        # A weight that the graph computes (tied and scaled, say) may come later than the first linear of this input.
        given = all(n is None or n.op in ("placeholder", "get_attr") for n in (w, b))
        if kernel and fits and given and linear_op.cpu.usable(values[0], [values[1]], [values[2]])[0]:
            of_input.setdefault(x, []).append((node, w, b))
        else:
            done.linears_left += 1
    for linears in of_input.values():
        for group in _batches(linears, most=16):
            _one_call(graph, group)
            done.linears += len(group)


def _batches(items: list[Any], most: int) -> list[list[Any]]:
    return [items[i : i + most] for i in range(0, len(items), most)]


def _one_call(graph: fx.Graph, linears: list[tuple[fx.Node, fx.Node, fx.Node | None]]) -> None:
    """All these linears, whose input is the same, as one node in the place of the first of them."""
    nodes = [node for node, _, _ in linears]
    x = _arguments(nodes[0], ("input",))[0]  # as it is now: where it was a linear itself, what has replaced it
    weights, biases = [w for _, w, _ in linears], [b for _, _, b in linears]
    with graph.inserting_before(nodes[0]):
        y = graph.call_function(torch.ops.fallow.row_linear.default, (x, weights, biases))
        ends = list(accumulate(_value(w).shape[0] for w in weights))
        parts = [graph.call_method("narrow", (y, -1, a, b - a)) for a, b in pairwise([0, *ends])]
    for node, part in zip(nodes, parts if len(nodes) > 1 else [y], strict=True):
        part.meta["example_value"] = _value(node)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _rewrite_attention(graph: fx.Graph, done: Rewritten) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not F.scaled_dot_product_attention:
            continue
        q, k, v, mask, dropout, causal = _arguments(node, names)
        k, v = _before_repeat(k), _before_repeat(v)
        plain = not dropout and not causal
        if not (plain and attention_op.cpu.available()[0] and _attention_fits(_value(q), _value(k), _value(v), mask)):
            done.attentions_left += 1
            continue
        scale = node.kwargs.get("scale")
        with graph.inserting_before(node):
            row = graph.call_method("squeeze", (q, 2))
            mask_BL = (
                None if mask is None else graph.call_method("select", (graph.call_method("select", (mask, 2, 0)), 1, 0))
            )
            scale = _value(q).shape[3] ** -0.5 if scale is None else scale
            y = graph.call_function(torch.ops.fallow.row_attention.default, (row, k, v, mask_BL, float(scale)))
            y = graph.call_method("unsqueeze", (y, 2))
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        done.attentions += 1


def _attention_fits(q: Any, k: Any, v: Any, mask: Any) -> bool:
    """Whether this is one query [B, H, 1, d] over [B, G, L, d] with a bool mask [B or 1, 1, 1, L] for all heads."""
    if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (q, k, v)) or q.shape[2] != 1:
        return False
    if q.shape[1] % k.shape[1] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        return False
    mask_BL = None
    if mask is not None:
        seen = _value(mask)
        if not isinstance(seen, Tensor) or seen.dim() != 4 or seen.shape[1:] != (1, 1, k.shape[2]):
            return False
        if seen.shape[0] not in (1, q.shape[0]):
            return False
        mask_BL = seen[:, 0, 0]
    return attention_op.cpu.usable(q.squeeze(2), k, v, mask_BL)[0]


def _before_repeat(node: Any) -> Any:
    """Keys or values before transformers' `repeat_kv`: k[:, :, None].expand(B, G, n, L, d).reshape(B, G n, L, d)."""
    chain: tuple[Callable[[fx.Node], bool], ...] = (
        lambda n: n.op == "call_method" and n.target == "reshape" and _value(n).dim() == 4,
        lambda n: n.op == "call_method" and n.target == "expand" and _value(n).dim() == 5,
        lambda n: n.op == "call_function" and getattr(n.target, "__name__", "") == "getitem",
    )
    at = node
    for step in chain:
        if not isinstance(at, fx.Node) or not isinstance(_value(at), Tensor) or not step(at):
            return node
        at = at.args[0]
    before, after = _value(at), _value(node)
    repeated = isinstance(before, Tensor) and before.dim() == 4 and before.shape[2:] == after.shape[2:]
    inserted = _value(node.args[0].args[0])  # k[:, :, None]
    if not repeated or after.shape[1] % before.shape[1] or inserted.shape != before.unsqueeze(2).shape:
        return node
    return at
