"""`Decoder`: the tokens of stock `generate`, dense and sparse, compiled and eager; streaming, stopping, refusals."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import tiny_model

import fallow
from fallow.errors import ConfigError
from fallow.ops import native
from fallow.serving import Decoder, Sampling, pick
from fallow.serving import decoder as module

PROMPT = [5, 17, 9, 33, 21, 8, 64, 100, 3, 77]
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads of 16, which the kernel for attention serves."""


def made(family: str = "llama", **settings):
    return tiny_model(family, **settings).eval()


def stock(model, new: int, prompt=PROMPT, **how) -> list[int]:
    how = {"do_sample": False, "eos_token_id": None, "use_cache": True} | how
    return model.generate(torch.tensor([prompt]), max_new_tokens=new, **how)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "gpt2", "phi3"])
def test_eager_tokens_are_those_of_stock_generate(family) -> None:
    """Sliding windows (gemma, of 16) included: 30 tokens go past one."""
    model = made(family)
    found = Decoder(model, max_tokens=40, compiled=False).generate(PROMPT, max_new_tokens=30, stop_tokens=())
    assert found.tokens == stock(model, 30)
    assert found.stopped == "length" and found.prompt_tokens == len(PROMPT) and found.decoded == 29
    assert found.tokens_per_second == pytest.approx(29 / found.decode_seconds)


def test_compiled_tokens_are_those_of_stock_generate() -> None:
    model, said = made(**WIDE), []
    decoder = Decoder(model, max_tokens=40, say=said.append)
    first = decoder.generate(PROMPT, max_new_tokens=20, stop_tokens=())
    assert first.tokens == stock(model, 20) and decoder.note == "compiled" and not said
    assert first.compile_seconds > 0 and first.decoded == 18, "the step that compiled is not timed as a token"
    rewritten = decoder.rewritten
    assert rewritten is not None
    if native.available()[0]:
        assert (rewritten.linears, rewritten.attentions) == (15, 2), "seven linears and one attention a layer, and head"
        assert (rewritten.linears_left, rewritten.attentions_left) == (0, 0)
    again = decoder.generate(PROMPT[:4], max_new_tokens=20, stop_tokens=())
    assert again.tokens == stock(model, 20, PROMPT[:4]) and again.compile_seconds == 0
    assert decoder._unguarded is not None, "after the second step of a text the graph is called past Dynamo's guards"


def test_one_loop_serves_dense_and_sparse_and_follows_the_weights() -> None:
    """The mode, `keep` and weights may change between texts of one decoder, and stock `generate` agrees each time."""
    model = made(**WIDE, dtype=torch.float32)
    dense = stock(model, 12)
    handle = fallow.sparsify(model, fallow.Upcycle(bank=16, keep=4, predictor="quantized"))
    decoder, texts = Decoder(model, max_tokens=32), []

    def both() -> None:
        with torch.no_grad():
            texts.append(decoder.generate(PROMPT, max_new_tokens=12, stop_tokens=()).tokens)
        assert texts[-1] == stock(model, 12)

    handle.set_mode("sparse")
    both()
    handle.set_mode("dense")
    both()
    assert texts[1] == dense != texts[0]
    handle.set_mode("sparse")
    for layer in handle.layers:
        layer.keep = 16
    both()
    assert texts[2] == dense, "with every channel kept, sparse is dense"
    assert decoder.note == "compiled"
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    both()
    assert texts[3] != texts[2]


def test_a_step_that_does_not_compile_falls_back_in_the_middle_of_a_text(monkeypatch) -> None:
    model, said = made(), []
    decoder = Decoder(model, max_tokens=40, say=said.append)

    def broken(graph) -> None:
        raise RuntimeError("no such kernel\nand more lines")

    monkeypatch.setattr(module, "rewrite", broken)
    found = decoder.generate(PROMPT, max_new_tokens=12, stop_tokens=())
    assert found.tokens == stock(model, 12)
    assert len(said) == 1 and "falls back to eager" in said[0] and "\n" not in said[0]
    assert decoder.note.startswith("eager: torch.compile failed")


def test_tokens_are_streamed_and_generation_stops_at_a_stop_token() -> None:
    model = made()
    whole = stock(model, 12)
    stop = whole[5]
    seen: list[int] = []
    decoder = Decoder(model, max_tokens=40, compiled=False)
    found = decoder.generate(PROMPT, max_new_tokens=12, stop_tokens=[stop], on_token=seen.append)
    assert found.tokens == seen == whole[: whole.index(stop) + 1] and found.stopped == "stop"
    model.generation_config.eos_token_id = [99999, stop]
    assert decoder.generate(PROMPT, max_new_tokens=12).tokens == found.tokens, "the model's own, where none are given"
    with pytest.raises(KeyboardInterrupt):
        decoder.generate(PROMPT, max_new_tokens=12, on_token=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert decoder.generate(PROMPT, max_new_tokens=12).tokens == found.tokens, "an interrupted text leaves nothing"


def test_a_text_can_be_rewound() -> None:
    decoder = Decoder(made(), max_tokens=20, compiled=False)
    decoder.prefill(PROMPT)
    first = [decoder.step(t).clone() for t in (5, 6, 7)]
    decoder.rewind(len(PROMPT) + 1)
    torch.testing.assert_close(decoder.step(6), first[1])
    torch.testing.assert_close(decoder.step(7), first[2])
    for length in (0, 14):
        with pytest.raises(ConfigError, match="rewind"):
            decoder.rewind(length)


def test_what_does_not_fit_is_refused() -> None:
    model = made()
    decoder = Decoder(model, max_tokens=12, compiled=False)
    with pytest.raises(ConfigError, match="10 prompt tokens and 3 new ones do not fit into the cache of 12"):
        decoder.generate(PROMPT, max_new_tokens=3)
    assert len(decoder.generate(PROMPT, max_new_tokens=2, stop_tokens=()).tokens) == 2
    decoder.step(5)
    with pytest.raises(ConfigError, match="the cache is full with 12 tokens"):
        decoder.step(6)
    for bad in ({"prompt": [], "max_new_tokens": 1}, {"prompt": PROMPT, "max_new_tokens": 0}):
        with pytest.raises(ConfigError, match="at least"):
            decoder.generate(**bad)
    with pytest.raises(ConfigError, match="beyond the 128 positions"):
        Decoder(model, max_tokens=129)
    with pytest.raises(ConfigError, match=r"model\.eval"):
        Decoder(model.train(), max_tokens=12).generate(PROMPT, max_new_tokens=1)


def test_sampling_draws_from_the_nucleus_with_its_probabilities() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    chance = torch.Generator().manual_seed(0)

    def shares(**how) -> torch.Tensor:
        sampling = Sampling(**how)
        drawn = torch.tensor([pick(logits_V, sampling, chance) for _ in range(4000)])
        return torch.bincount(drawn, minlength=4) / 4000

    torch.testing.assert_close(shares(temperature=1.0), logits_V.exp(), atol=0.03, rtol=0)
    torch.testing.assert_close(
        shares(temperature=1.0, top_p=0.8), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0
    )
    assert shares(temperature=1.0, top_p=0.01)[0] == 1, "the likeliest token always stays"
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(shares(temperature=0.5), squared / squared.sum(), atol=0.03, rtol=0)
    assert pick(logits_V, Sampling()) == 0
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(ConfigError):
            Sampling(**bad)


def test_a_seed_gives_the_same_text_again() -> None:
    decoder = Decoder(made(), max_tokens=40, compiled=False)

    def text(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.5, top_p=0.95, seed=seed)
        return decoder.generate(PROMPT, max_new_tokens=20, sampling=sampling, stop_tokens=()).tokens

    assert text(1) == text(1) != text(2)
