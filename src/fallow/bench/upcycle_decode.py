"""Decoding end to end, batch 1: tokens per second of a whole model, sparse against the fastest dense in the same loop.

Both run in `serving.Decoder`: static cache, one compiled step, the same kernels for linears and attention. Dense is the
fastest of: eager, compiled with torch's linears, compiled with ours, and with `bank_ffn` keeping every channel. A token
reads all weights once, so `ideal` is the ratio of bytes read, predictors and the cache included. e2e-1b has random
weights (speed does not depend on them); e2e-135m is SmolLM2, also timed against stock `generate()` as users call it.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

import fallow
from fallow import anatomy
from fallow.anatomy import FFNView
from fallow.bench.harness import interleave
from fallow.errors import ConfigError
from fallow.methods.upcycle import Upcycle
from fallow.ops import bank_ffn, used
from fallow.serving import Decoder
from fallow.training.models import SMOLLM2, load

CASES = ("e2e-1b", "e2e-135m")
BANK, KEEP = 64, 16
PREDICTORS: dict[str, tuple[Upcycle, ...]] = {
    "e2e-1b": (
        Upcycle(bank=BANK, keep=KEEP, predictor="linear", rank=256),
        Upcycle(bank=BANK, keep=KEEP, predictor="quantized"),
    ),
    "e2e-135m": (
        Upcycle(bank=BANK, keep=KEEP, predictor="linear", rank=64),
        Upcycle(bank=BANK, keep=KEEP, predictor="quantized"),
        Upcycle(bank=BANK, keep=KEEP, predictor="quantized", compensation=64),
    ),
}
PROMPT, PLACES = 16, 128
_TOKENS = {"e2e-1b": 3, "e2e-135m": 12}
"""Tokens per form and round."""


class Loop:
    """A decoder in the middle of a text. A call reads the same few tokens again, past the guards of its graph."""

    def __init__(self, model: PreTrainedModel, tokens: int, **how: bool) -> None:
        self.decoder = Decoder(model, max_tokens=PLACES, say=_unwanted, **how)
        g = torch.Generator().manual_seed(1)
        *prompt, self._first = torch.randint(model.config.vocab_size, (PROMPT + 1,), generator=g).tolist()
        self._ids = torch.randint(model.config.vocab_size, (tokens,), generator=g).tolist()
        self.decoder.prefill(prompt)
        self.decoder.step(self._first)
        self()

    def __call__(self) -> None:
        self.decoder.rewind(PROMPT)
        for token in self._ids:
            self.decoder.step(token)


def _unwanted(line: str) -> None:
    raise ConfigError(f"bench upcycle: {line}; the figures would not be of the compiled loop")


def rows(quick: bool, cases: tuple[str, ...] = CASES, *, rounds: int | None = None) -> list[dict[str, Any]]:
    """One row per case and predictor.

    Args:
        quick: the first predictor of each case only, fewer rounds.
        cases: some of `CASES`.
        rounds: how many; None: 9, or 3 when quick.
    """
    found: list[dict[str, Any]] = []
    for case in cases:
        model = smollm2() if case == "e2e-135m" else random_1b()
        for config in PREDICTORS[case][: 1 if quick else None]:
            found.append(_row(case, model, config, rounds=rounds or (3 if quick else 9)))
            gc.collect()
        del model
        gc.collect()
    return found


@torch.no_grad()
def _row(case: str, model: PreTrainedModel, config: Upcycle, *, rounds: int) -> dict[str, Any]:
    tokens = _TOKENS[case]
    sparse, handle = upcycled(model, config)
    forms: dict[str, Callable[[], None]] = {
        "dense/eager": Loop(model, tokens, compiled=False),
        "dense/compiled": Loop(model, tokens, rewriting=False),
        "dense/kernels": Loop(model, tokens),
        "sparse/eager": Loop(sparse, tokens, compiled=False),
        "sparse/kernels": Loop(sparse, tokens),
    }
    backend = used().get("bank_ffn", "none")
    forms["dense/bank_ffn"] = Loop(everything_kept(model, handle), tokens)
    timing = interleave(forms, rounds=rounds, warm_up=1)
    dense, best = timing.fastest("dense/"), timing.fastest("sparse/")
    dense_bytes, sparse_bytes = bytes_read(model), bytes_read(model, handle)
    per_token = {name: 1e3 * timing.median(name) / tokens for name in forms}
    ratio, ideal = timing.ratio(dense, best), dense_bytes / sparse_bytes
    kind = f"{config.predictor} + {config.compensation}" if config.compensation else config.predictor
    row = {
        "case": case,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": 1,
        "predictor": config.predictor,
        "rank": config.rank,
        "bits": config.bits if config.predictor == "quantized" else None,
        "bank": BANK,
        "keep": KEEP,
        "share": KEEP / BANK,
        "compensation": config.compensation,
        "form": f"{kind}, keep {KEEP} of {BANK}",
        "context": PROMPT + 1 + tokens,
        "dense_ms": per_token[dense],
        "sparse_ms": per_token[best],
        "ratio": ratio,
        "ratio_quartiles": timing.spread(dense, best),
        "ideal": ideal,
        "efficiency": ratio / ideal,
        "backend": backend,
        "dense_form": dense,
        "sparse_form": best,
        "forms_ms": per_token,
        "dense_tokens_per_second": 1e3 / per_token[dense],
        "sparse_tokens_per_second": 1e3 / per_token[best],
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
        "rounds": rounds,
    }
    return row | (_against_stock(model, sparse, rounds=rounds) if case == "e2e-135m" else {})


def _against_stock(model: PreTrainedModel, sparse: PreTrainedModel, *, rounds: int) -> dict[str, Any]:
    """Whole calls, prompt included: stock `generate()` of the dense model, and our loop on the sparse one."""
    ids_1T = torch.arange(100, 100 + PROMPT)[None]
    new = PLACES // 4
    decoder = Decoder(sparse, max_tokens=PLACES, say=_unwanted)

    def ours() -> None:
        decoder.generate(ids_1T[0], max_new_tokens=new, stop_tokens=())

    def stock() -> None:
        model.generate(  # type: ignore[operator]
            ids_1T, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
        )

    timing = interleave({"stock": stock, "ours": ours}, rounds=rounds, warm_up=1)
    return {
        "stock_tokens_per_second": new / timing.median("stock"),
        "ours_tokens_per_second": new / timing.median("ours"),
        "ratio_stock": timing.ratio("stock", "ours"),
        "ratio_stock_quartiles": timing.spread("stock", "ours"),
    }


def bytes_read(model: PreTrainedModel, handle: Any | None = None) -> int:
    """Bytes of weights that one token reads, dense or by the layers of Upcycle's handle."""
    distinct = {p.data_ptr(): p.nbytes for p in model.parameters()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not table.weight:  # type: ignore[union-attr]
        distinct.pop(table.weight.data_ptr())  # type: ignore[union-attr]  # of which one row is read
    total = sum(distinct.values())
    if handle is None:
        return total
    for layer in handle.layers:
        w = layer.view.weights()
        total -= round((w.w_gate_FD.nbytes + w.w_up_FD.nbytes + w.w_down_DF.nbytes) * (1 - layer.keep / layer.bank))
    first = handle.layers[0]
    predictor = first.predictor.packed(first.view.weights())
    own = sum(t.nbytes for t in (*predictor.tensors, predictor.tilt_F) if t is not None)
    if first.predictor.compensation is not None:
        own += sum(t.nbytes for t in first.predictor.compensation.packed(model.dtype, 1.0))
    return total + len(handle.layers) * own


def _weights(view: FFNView) -> list[torch.nn.Parameter]:
    """The FFN's, whose layout in memory Upcycle changes."""
    return [where.parameter for where in view.parameters_along_channels()]


def _twin(model: PreTrainedModel, laid_out: list[list[torch.nn.Parameter]] | None = None) -> PreTrainedModel:
    """Another model of the same parameters, but for those of the FFNs: `laid_out`, or copies."""
    memo = {id(p): p for p in model.parameters()}
    for i, view in enumerate(anatomy.inspect(model).ffns):
        for j, own in enumerate(_weights(view)):
            memo[id(own)] = torch.nn.Parameter(own.detach().clone()) if laid_out is None else laid_out[i][j]
    return copy.deepcopy(model, memo)


def upcycled(model: PreTrainedModel, config: Upcycle) -> tuple[PreTrainedModel, Any]:
    """(a sparse twin in sparse mode, its handle). Linear predictors are random: which channels live costs the same."""
    sparse = _twin(model)
    handle = fallow.sparsify(sparse, config)
    g = torch.Generator().manual_seed(2)
    for layer in handle.layers if config.predictor == "linear" else ():  # type: ignore[attr-defined]
        for factor in layer.predictor.parameters():
            factor.data.normal_(0, factor.shape[1] ** -0.5, generator=g)
        layer.predictor.started = True
    handle.set_mode("sparse")
    return sparse, handle


def everything_kept(model: PreTrainedModel, handle: Any) -> PreTrainedModel:
    """A dense twin whose FFNs are `bank_ffn` with every channel kept, on the handle's weights."""
    kept = _twin(model, [_weights(layer.view) for layer in handle.layers])
    for view in anatomy.inspect(kept).ffns:
        view.install(_keeping_all(view))
    return kept


def _keeping_all(view: FFNView) -> Callable[[Tensor], Tensor]:
    scores = bank_ffn.Predictor("scores", (torch.zeros(1, view.n_channels),))

    def forward(x: Tensor) -> Tensor:
        w = view.weights()
        assert w.w_gate_FD is not None
        if x.shape[1] > 1:  # the prompt
            return view.dense(x)
        weights = (w.w_gate_FD, w.w_up_FD, w.w_down_DF.t())
        return bank_ffn.bank_ffn(x, scores, *weights, act=view.act, bank=BANK, keep=BANK)

    return forward


def smollm2() -> PreTrainedModel:
    """SmolLM2-135M in bf16. Raises ConfigError: its package is not installed."""
    model, _ = load(SMOLLM2, None, torch.bfloat16)
    return model.eval()


def random_1b() -> PreTrainedModel:
    """The shape of Qwen2.5-1.5B in bf16, 3.1 GB, with random weights."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
