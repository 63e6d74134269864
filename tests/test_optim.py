"""fallow.optim: AdamW with fp32 masters against torch's, exact resume, lazy neurons, FSDP2 on two ranks."""

from __future__ import annotations

import io

import pytest
import torch

from fallow.errors import CheckpointError, ConfigError
from fallow.optim import AdamW, LazyRows, adamw_for
from tests.ranks import run_ranks
from tests.tiny_models import tiny_batch, tiny_model

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _params(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in [(8, 6), (5,), (3, 4)]]


def _set_grads(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def test_fp32_is_torchs_adamw(monkeypatch):
    """Bit-equal with the naive backend; to 1e-6 with native (its square root is correctly rounded, MKL's is not)."""
    for exact in (True, False):
        if exact:
            monkeypatch.setattr("fallow.ops.adamw.cpu.available", lambda: (False, "switched off"))
        else:
            monkeypatch.undo()
        ours, stock = _params(torch.float32), _params(torch.float32)
        optimizer, reference = AdamW(ours, **SETTINGS), torch.optim.AdamW(stock, **SETTINGS)
        for step in range(20):
            _set_grads(ours, step)
            _set_grads(stock, step)
            optimizer.step()
            reference.step()
        for a, b in zip(ours, stock, strict=True):
            assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-6, atol=1e-7)


def test_bf16_parameters_follow_their_fp32_masters():
    """Updates of 1e-4 of a weight vanish in bf16; with a master they add up as in fp32."""
    ours, stock = _params(torch.bfloat16), [torch.nn.Parameter(p.detach().float()) for p in _params(torch.bfloat16)]
    settings = {**SETTINGS, "lr": 1e-4, "weight_decay": 0.0}
    optimizer, reference = AdamW(ours, **settings), torch.optim.AdamW(stock, **settings)
    start = ours[0].detach().clone()
    for _ in range(200):
        _set_grads(ours, 0)
        for a, b in zip(ours, stock, strict=True):
            b.grad = a.grad.float()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, stock, strict=True):
        assert torch.allclose(optimizer.state[a]["master"], b, rtol=1e-5, atol=1e-6)
        assert torch.equal(a, optimizer.state[a]["master"].bfloat16())
    assert (ours[0] - start).abs().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lazy", [False, True], ids=["whole", "lazy"])
def test_resume_is_bit_exact(dtype, lazy):
    def hook(param):
        return LazyRows(dim=0, index=torch.tensor([0, 2])) if lazy and param.ndim > 1 else None

    def train(params, optimizer, steps):
        for step in steps:
            _set_grads(params, step)
            optimizer.step()

    straight = _params(dtype)
    train(straight, AdamW(straight, **SETTINGS, lazy=hook), range(8))
    first = _params(dtype)
    before = AdamW(first, **SETTINGS, lazy=hook)
    train(first, before, range(4))
    file = io.BytesIO()
    torch.save({"weights": first, "optimizer": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    resumed = saved["weights"]
    after = AdamW(resumed, **SETTINGS, lazy=hook)
    after.load_state_dict(saved["optimizer"])
    for a, b in zip(first, resumed, strict=True):
        assert before.state[a].keys() == after.state[b].keys()
        for key, value in before.state[a].items():
            restored = after.state[b][key]
            same = (
                torch.equal(value, restored) and value.dtype == restored.dtype
                if torch.is_tensor(value)
                else value == restored
            )
            assert same, key
    train(resumed, after, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_state_of_another_optimizer_is_refused():
    params = _params(torch.bfloat16)
    stock = torch.optim.AdamW(params, lr=1e-3)
    _set_grads(params, 0)
    stock.step()
    with pytest.raises(CheckpointError, match="float32"):
        AdamW(params, lr=1e-3).load_state_dict(stock.state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        AdamW(params[:2], lr=1e-3).load_state_dict(AdamW(params, lr=1e-3).state_dict())


@pytest.mark.parametrize("dim", [0, 1])
def test_omitted_neurons_are_frozen_and_dense_steps_resume_their_clocks(dim):
    param = torch.nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    kept = torch.tensor([1, 4])
    taken = {"now": None}
    optimizer = AdamW([param], **SETTINGS, lazy=lambda _: taken["now"])
    _set_grads([param], 0)
    optimizer.step()
    taken["now"] = LazyRows(dim=dim, index=kept)
    before = param.detach().clone()
    for step in range(1, 4):
        _set_grads([param], step)
        optimizer.step()
    moved = (param.detach() != before).any(1 - dim)
    assert moved.nonzero().squeeze(1).tolist() == [1, 4]
    assert optimizer.state[param]["clock"].tolist() == [1, 4, 1, 1, 4, 1]
    taken["now"] = None
    optimizer.step()
    assert optimizer.state[param]["clock"].tolist() == [2, 5, 2, 2, 5, 2]
    taken["now"] = LazyRows(dim=1 - dim, index=kept)
    with pytest.raises(ConfigError, match="one dim"):
        optimizer.step()


def test_grad_scale_is_clipping():
    scaled, clipped = _params(torch.float32), _params(torch.float32)
    a, b = AdamW(scaled, **SETTINGS), AdamW(clipped, **SETTINGS)
    for step in range(3):
        _set_grads(scaled, step)
        _set_grads(clipped, step)
        for param in clipped:
            param.grad.mul_(0.25)
        a.step(grad_scale=0.25)
        b.step()
    assert all(torch.equal(x, y) for x, y in zip(scaled, clipped, strict=True))


def test_groups_of_a_model():
    model = tiny_model("qwen2", tie_word_embeddings=True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    optimizer = adamw_for(model, lr=1e-3, weight_decay=0.1)
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.ndim > 1 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0 and all(p.ndim == 1 for p in plain["params"])
    found = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(set(found)) == sum(p.requires_grad for p in model.parameters())
    model(**tiny_batch()).loss.backward()
    before = model.lm_head.weight.detach().clone()
    optimizer.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight and not torch.equal(before, model.lm_head.weight)


def test_bad_settings():
    params = _params(torch.float32)
    with pytest.raises(ConfigError, match="negative"):
        AdamW(params, lr=-1.0)
    with pytest.raises(ConfigError, match="betas"):
        AdamW(params, lr=1.0, betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="dtype"):
        AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))], lr=1.0)
    with pytest.raises(ConfigError, match="trainable"):
        adamw_for(torch.nn.Linear(2, 2).requires_grad_(False), lr=1.0)
    with pytest.raises(ConfigError, match="outside"):
        _set_grads(params, 0)
        AdamW(params, lr=1.0, lazy=lambda _: LazyRows(dim=0, index=torch.tensor([99]))).step()


def _lazy_for_sharding(param):
    return LazyRows(dim=0, index=torch.tensor([0, 3, 6])) if param.ndim == 2 and param.shape[0] == 7 else None


def _small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).bfloat16()


def _train_small(model, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


def _sharded_worker(rank, path):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    model = _small_model()
    fully_shard(model)
    optimizer = adamw_for(model, lr=1e-2, weight_decay=0.1, lazy=_lazy_for_sharding)
    _train_small(model, optimizer, range(4))
    state = get_optimizer_state_dict(model, optimizer)
    optimizer = adamw_for(model, lr=1e-2, weight_decay=0.1, lazy=_lazy_for_sharding)
    set_optimizer_state_dict(model, optimizer, state)
    _train_small(model, optimizer, range(4, 8))
    whole = {n: p.full_tensor() for n, p in model.state_dict().items()}
    if rank == 0:
        torch.save(whole, path)


def test_two_ranks_equal_one(tmp_path):
    """FSDP2 with uneven shards (7 rows on 2 ranks), bf16 masters, lazy rows, a state dict round trip in the middle."""
    model = _small_model()
    _train_small(model, adamw_for(model, lr=1e-2, weight_decay=0.1, lazy=_lazy_for_sharding), range(8))
    path = tmp_path / "weights.pt"
    run_ranks(_sharded_worker, str(path), folder=tmp_path)
    sharded = torch.load(path)
    for name, expected in model.state_dict().items():
        assert torch.allclose(sharded[name].float(), expected.float(), rtol=2**-8, atol=1e-3), name
