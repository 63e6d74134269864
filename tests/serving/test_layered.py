"""The step in parts gives the logits of the stock step, for every family that it says it serves, dense and sparse; a
GPU replays it, here the parts are called one by one."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import tiny_model

import fallow
from fallow.anatomy.rotary import LIKE_LLAMA, like_llama
from fallow.serving import Decoder, layered

PROMPT = [5, 17, 9, 33, 21]
PLACES = 24


def in_parts(model, tokens: list[int], *, compiled: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(logits of the parts, of the stock step) for tokens after the prompt."""
    decoder = Decoder(model, max_tokens=PLACES, compiled=False)
    token_11 = torch.zeros(1, 1, dtype=torch.long)
    decoder.prefill(PROMPT)
    want = [decoder.step(token).clone() for token in tokens]
    decoder.prefill(PROMPT)
    decoder.step(tokens[0])
    replay, got = layered.Replay(model, decoder._cache, PLACES, compiled=compiled), [want[0]]
    for place, token in enumerate(tokens[1:], start=len(PROMPT) + 1):
        token_11.fill_(token)
        got.append(replay(token_11, place).clone())
    return got, want


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_logits_are_those_of_the_stock_step(family) -> None:
    model = tiny_model(family, dtype=torch.float32).eval()
    if family == "mistral":
        model.config.sliding_window = None
    assert like_llama(model) == (True, "a layer at a time")
    for got, want in zip(*in_parts(model, [7, 3, 60, 11], compiled=False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "quantized"])
def test_compiled_parts_serve_dense_and_sparse(kind) -> None:
    model = tiny_model("llama", dtype=torch.float32).eval()
    handle = fallow.sparsify(model, fallow.Upcycle(bank=16, keep=4, predictor=kind, compensation=4))
    for mode in ("sparse", "dense"):
        handle.set_mode(mode)
        for got, want in zip(*in_parts(model, [7, 3, 60, 11], compiled=True), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_weights_may_change_between_texts() -> None:
    model = tiny_model("llama", dtype=torch.float32).eval()
    decoder = Decoder(model, max_tokens=PLACES, compiled=False)
    replay, token_11 = layered.Replay(model, decoder._cache, PLACES, compiled=False), torch.full((1, 1), 9)
    for _ in range(2):
        decoder.prefill(PROMPT)
        decoder.step(7)
        replay.forget()
        assert not replay.ready
        got = replay(token_11, len(PROMPT) + 1).clone()
        assert replay.ready
        decoder.rewind(len(PROMPT) + 1)
        torch.testing.assert_close(got, decoder.step(9), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(1.5)
                layer.self_attn.v_proj.weight.neg_()
    assert not any(hasattr(layer.self_attn, "merged") for layer in model.model.layers), "the model is left as it was"


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "phi3"])
def test_other_families_are_refused(family) -> None:
    assert not like_llama(tiny_model(family))[0]


def test_windows_and_growing_ropes_are_refused() -> None:
    windowed, growing = tiny_model("mistral"), tiny_model("llama")
    windowed.config.sliding_window = 8
    growing.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert like_llama(windowed) == (False, "a sliding window")
    assert like_llama(growing) == (False, "rope of type dynamic")
