"""Two FSDP2 ranks under gloo, each with half of the batch, equal one process with the whole of it, for every method."""

from __future__ import annotations

import pytest
import torch

from tests.matrix.rows import EVERY
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model

STEPS = 4
# eps 1e-4: Adam turns a gradient of 1e-9, which is rounding noise, into a step of the full learning rate otherwise.


def batch(step: int) -> torch.Tensor:
    return torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(step))


def train(index, model, handle, optimizer, rows: slice) -> list[list[torch.Tensor]]:
    chosen = []
    handle.watch({"input_ids": batch(99)})  # the same on every rank; nothing to methods that look at no batch
    for step in range(STEPS):
        handle.before_step(step, STEPS)
        ids = batch(step)[rows]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        handle.after_step(step, STEPS)
        chosen.append(EVERY[index].choice(handle))
    return chosen


def worker(rank: int, index: int, lazy: bool, out: str) -> None:
    from torch.distributed.fsdp import fully_shard

    import fallow

    model = tiny_model("llama").train()
    handle = fallow.sparsify(model, config_of(index, lazy))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = handle.optimizer(lr=1e-2, eps=1e-4)
    chosen = train(index, model, handle, optimizer, slice(2 * rank, 2 * rank + 2))
    weights = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
    torch.save({"weights": weights, "chosen": chosen}, f"{out}/rank{rank}.pt")


def config_of(index: int, lazy: bool):
    from dataclasses import replace

    config = EVERY[index].config()
    return replace(config, lazy=lazy) if hasattr(config, "lazy") else config


@pytest.mark.parametrize("lazy", [False, True], ids=["adamw", "lazy"])
@pytest.mark.parametrize("index", range(len(EVERY)), ids=[r.name for r in EVERY])
def test_two_ranks_equal_one(index, lazy, tmp_path):
    import fallow

    if lazy and not hasattr(EVERY[index].config(), "lazy"):
        pytest.skip("the method has no lazy state")
    run_ranks(worker, index, lazy, str(tmp_path), folder=tmp_path)

    model = tiny_model("llama").train()
    handle = fallow.sparsify(model, config_of(index, lazy))
    chosen = train(index, model, handle, handle.optimizer(lr=1e-2, eps=1e-4), slice(None))

    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    for r in ranks:
        assert all(
            torch.equal(a, b) for s, t in zip(chosen, r["chosen"], strict=True) for a, b in zip(s, t, strict=True)
        )
    for name, p in model.named_parameters():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(
            ranks[0]["weights"][name], p, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
