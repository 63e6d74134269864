"""ops/attention: the CPU backend against the fp32 truth, masks of every kind, and inside transformers models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import FAMILIES, tiny_batch, tiny_model

from fallow.errors import ConfigError
from fallow.ops import attention

LOWEST = torch.finfo(torch.float32).min
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
REFUSED = ("gemma2",)


def _inputs(batch, heads, groups, tokens, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(batch, tokens, h, width, generator=generator).to(dtype) for h in (heads, groups, groups, heads)]
    return [x.transpose(1, 2) for x in draw]


def _run(backend, tensors, dtype, **options):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors[:3])
    out = backend.attention(q, k, v, scale=0.3, dropout=0.0, **options)
    out.backward(tensors[3].to(dtype))
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def _assert_equals_naive(tensors, dtype, **options):
    truth = _run(attention.naive, tensors, torch.float32, **options)
    found = _run(attention.cpu, tensors, dtype, **options)
    for name, expected in truth.items():
        error = (found[name].float() - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def _random_mask(batch, tokens, seed=0):
    mask = torch.rand(batch, 1, tokens, tokens, generator=torch.Generator().manual_seed(seed)) > 0.5
    mask[0, 0, 3] = False
    mask[:, 0, 64:128] = False
    return mask


@pytest.mark.parametrize("keep_bytes", [1 << 30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", ["causal", "full", "bool", "bool+causal", "additive", "shared"])
def test_cpu_equals_naive(kind, dtype, keep_bytes, monkeypatch):
    monkeypatch.setattr(attention.cpu, "_KEEP_BYTES", keep_bytes)
    mask = _random_mask(2, 150)
    scores = torch.randn(2, 1, 150, 150, generator=torch.Generator().manual_seed(1))
    masks = {
        "bool": mask,
        "bool+causal": mask,
        "additive": torch.where(mask, scores, LOWEST),
        "shared": mask[:1],
    }
    _assert_equals_naive(_inputs(2, 6, 2, 150, 16, dtype), dtype, mask=masks.get(kind), causal="causal" in kind)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 4),
    tokens=st.integers(1, 200),
    causal=st.booleans(),
    masked=st.booleans(),
)
def test_ragged_shapes(batch, groups, repeats, tokens, causal, masked):
    mask = (
        torch.rand(batch, 1, tokens, tokens, generator=torch.Generator().manual_seed(tokens)) > 0.3 if masked else None
    )
    tensors = _inputs(batch, groups * repeats, groups, tokens, 8, torch.float32)
    _assert_equals_naive(tensors, torch.float32, mask=mask, causal=causal)


def test_unwritten_memory_is_never_read():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        _assert_equals_naive(
            _inputs(2, 4, 2, 130, 8, torch.float32), torch.float32, mask=_random_mask(2, 130), causal=True
        )
    finally:
        torch.use_deterministic_algorithms(False)


def test_query_without_keys_gives_zeros_and_no_gradient():
    mask = torch.ones(1, 1, 80, 80, dtype=torch.bool)
    mask[0, 0, 5] = False
    found = _run(attention.cpu, _inputs(1, 2, 1, 80, 8, torch.float32), torch.float32, mask=mask, causal=False)
    assert found["out"][:, :, 5].abs().max() == 0 and found["dq"][:, :, 5].abs().max() == 0
    assert found["out"][:, :, 6].abs().min() > 0


def test_masks_changed_in_place_are_read_again():
    tensors = _inputs(1, 2, 1, 128, 8, torch.float32)
    mask = torch.zeros(1, 1, 128, 128, dtype=torch.bool)
    mask[..., :4] = True
    first = _run(attention.cpu, tensors, torch.float32, mask=mask, causal=False)["out"]
    mask[..., :] = True
    _assert_equals_naive(tensors, torch.float32, mask=mask, causal=False)
    second = _run(attention.cpu, tensors, torch.float32, mask=mask, causal=False)["out"]
    assert (first - second).abs().max() > 0.1


def test_documents_see_only_their_own_block():
    """Key blocks that no query of a query block may see are skipped: their keys may hold NaN."""
    q, k, v, _ = _inputs(1, 2, 1, 256, 8, torch.float32)
    document = torch.arange(256) // 128
    mask = (document[:, None] == document[None, :]).tril()[None, None]
    k[:, :, :128], v[:, :, :128] = float("nan"), float("nan")
    out = attention.attention(q, k, v, scale=0.3, mask=mask)
    assert torch.isfinite(out[:, :, 128:]).all() and torch.isnan(out[:, :, :128]).all()
    assert attention.last_used == "cpu"


def test_dropout_is_left_to_naive_and_heads_must_fit():
    q, k, v, _ = _inputs(1, 4, 2, 64, 8, torch.float32)
    torch.manual_seed(0)
    out = attention.attention(q, k, v, scale=0.3, causal=True, dropout=0.5)
    assert (
        attention.last_used == "naive"
        and (out - attention.attention(q, k, v, scale=0.3, causal=True)).abs().max() > 0.1
    )
    with pytest.raises(ConfigError, match="query heads"):
        attention.attention(q[:, :3], k, v, scale=0.3)


def test_gradients_pass_torch_library_checks():
    q, k, v, _ = _inputs(1, 2, 1, 70, 4, torch.float32)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    bounds = attention.cpu._bounds(None, True, 70, 64)
    torch.library.opcheck(attention.cpu._forward, (q, k, v, None, bounds, 0.5, True, 0))


def _loss_and_grads(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _batches():
    plain = tiny_batch(tokens=100)
    positions = torch.cat([torch.arange(30), torch.arange(70)])[None].expand(2, -1)
    packed = {"input_ids": plain["input_ids"], "labels": plain["labels"], "position_ids": positions}
    padded = {k: v.clone() for k, v in plain.items()}
    padded["attention_mask"][0, :20] = 0
    padded["labels"][0, :21] = -100
    return {"plain": plain, "packed": packed, "padded": padded}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in REFUSED])
def test_models_match_their_stock_attention(family):
    model = tiny_model(family)
    for kind, batch in _batches().items():
        expected_loss, expected = _loss_and_grads(model, batch)
        assert "fallow_cpu (" in attention.enable(model)
        attention.last_used = "none"
        loss, grads = _loss_and_grads(model, batch)
        assert attention.last_used == "cpu"
        attention.disable(model)
        assert loss == pytest.approx(expected_loss, rel=1e-5), kind
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert torch.allclose(grad, expected[name], rtol=1e-3, atol=1e-5), f"{kind}: {name}"


def test_packed_documents_do_not_leak():
    model = tiny_model("llama").eval()
    attention.enable(model)
    batch = _batches()["packed"]
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, :30] = (changed["input_ids"][:, :30] + 1) % 100
    before, after = model(**batch).logits, model(**changed).logits
    assert torch.equal(before[:, 30:], after[:, 30:]) and (before[:, :30] - after[:, :30]).abs().max() > 0.1


def test_enable_says_what_it_did_and_disable_undoes_it(tmp_path):
    model = tiny_model("llama")
    stock = model.config._attn_implementation
    assert "instead of" in attention.enable(model) and "already" in attention.enable(model)
    model.save_pretrained(tmp_path)
    assert "fallow" not in (tmp_path / "config.json").read_text()
    attention.disable(model)
    assert model.config._attn_implementation == stock
    refused = tiny_model("gemma2")
    assert "kept, because" in attention.enable(refused) and refused.config._attn_implementation != "fallow_cpu"
    assert "float64" in attention.enable(tiny_model("llama", dtype=torch.float64))


def test_generation_with_a_cache_is_stock():
    model = tiny_model("llama").eval()
    ids = tiny_batch()["input_ids"]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    attention.enable(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True), expected)
    assert attention.last_used == "sdpa"


def test_gradient_checkpointing_and_compile():
    model = tiny_model("llama")
    attention.enable(model)
    batch = tiny_batch(tokens=70)
    loss, grads = _loss_and_grads(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, checkpointed = _loss_and_grads(model, batch)
    assert again == loss and all(torch.equal(grads[n], checkpointed[n]) for n in grads)
    model.gradient_checkpointing_disable()
    compiled_loss, compiled = _loss_and_grads(torch.compile(model, backend="aot_eager"), batch)
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(compiled["_orig_mod." + name], grad, rtol=1e-3, atol=1e-5), name
