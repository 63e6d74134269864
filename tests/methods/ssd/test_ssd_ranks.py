"""Two FSDP2 ranks decide, sort and train as one process does: every layer wrapped, or only the root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.methods.ssd.steps import SWITCHING, batch, made, phases
from tests.ranks import run_ranks

from fallow.methods.ssd import switching

TOTAL = 20
SETTINGS: dict[str, Any] = SWITCHING | {"active": 2, "experts": 16}
# eps 1e-3: Adam turns a gradient of rounding noise into a step that counts otherwise, and noise differs by CPU.


def train(model: Any, handle: Any, rows: slice) -> tuple[list[float], list[Any]]:
    optimizer = handle.optimizer(lr=1e-2, eps=1e-3, weight_decay=0.1)
    losses, gradients = [], []
    for step in range(TOTAL):
        handle.before_step(step, TOTAL)
        ids = batch(step, n=2)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients.append([layer.router.grad for layer in handle.layers])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        handle.after_step(step, TOTAL)
        optimizer.zero_grad()
        found = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(found)
            found /= dist.get_world_size()
        losses.append(float(found))
    return losses, gradients


def outcome(handle: Any, losses: list[float], gradients: list[Any]) -> dict[str, Any]:
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in handle.model.named_parameters()}
    return {
        "losses": losses,
        "router_gradients": gradients,
        "log": [e.as_dict() for e in handle.log],
        "phases": phases(handle),
        "partitions": handle.partitions,
        "ids": [layer.ids for layer in handle.layers],
        "routers": [layer.router.detach() for layer in handle.layers],
        "weights": {n: p.detach().clone() for n, p in whole.items()},
    }


CASES = (("layers", "llama"), ("root", "llama"), ("layers", "arcee"))
"""What is wrapped, and the family."""


def worker(rank: int, out: str) -> None:
    from torch.distributed.fsdp import fully_shard

    for wrapped, family in CASES:
        model, handle = made(family, **SETTINGS)
        for layer in model.model.layers if wrapped == "layers" else ():
            fully_shard(layer)
        fully_shard(model)
        torch.save(outcome(handle, *train(model, handle, slice(rank, rank + 1))), f"{out}/{wrapped}-{family}-{rank}.pt")
    torch.save({watch: on_the_spot(watch) for watch in (False, True)}, f"{out}/spot-{rank}.pt")


def on_the_spot(watch: bool) -> dict[str, Any]:
    """Experts made right after a forward pass that left the root gathered."""
    from torch.distributed.fsdp import fully_shard

    model, handle = made("llama", watch=watch)
    fully_shard(model)
    model.eval()
    logits = {}
    with torch.no_grad():
        logits["before"] = model(input_ids=batch(5)).logits
        handle.set_mode("sparse")
        logits["sparse"] = model(input_ids=batch(5)).logits
        handle.set_mode("dense")
        logits["dense"] = model(input_ids=batch(5)).logits
    model.reshard()
    return logits | outcome(handle, [], [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks left: one start of the processes for all cases."""
    path = tmp_path_factory.mktemp("ranks")
    run_ranks(worker, str(path), folder=path)
    return path


@pytest.mark.parametrize(("wrapped", "family"), CASES)
def test_two_ranks_equal_one(wrapped: str, family: str, folder: Path) -> None:
    one, other = (torch.load(folder / f"{wrapped}-{family}-{r}.pt") for r in range(2))
    assert one["log"] == other["log"] and one["losses"] == other["losses"]
    assert all(torch.equal(a, b) for k in ("ids", "routers") for a, b in zip(one[k], other[k], strict=True))
    assert all(torch.equal(w, other["weights"][n]) for n, w in one["weights"].items())

    model, handle = made(family, **SETTINGS)
    alone = outcome(handle, *train(model, handle, slice(None)))
    assert set(alone["phases"]) == {"d", "s", "m"} and len(alone["partitions"]) >= 2
    assert one["phases"] == alone["phases"]
    assert all(torch.equal(a, b) for a, b in zip(one["ids"], alone["ids"], strict=True))
    torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=0)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(one["weights"][name], weight, rtol=1e-4, atol=1e-5)
    for a, b in zip(one["routers"], alone["routers"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    steps = [n for n, (g, _) in enumerate(alone["router_gradients"]) if g is not None]
    assert len(steps) >= 8 and all((one["router_gradients"][n][0] is not None) == (n in steps) for n in range(TOTAL))
    for n in steps:
        for r, (a, b) in enumerate(zip(one["router_gradients"][n], alone["router_gradients"][n], strict=True)):
            assert torch.equal(a, other["router_gradients"][n][r])
            assert float((a - b).norm() / b.norm()) < 1e-2, (n, r)
    told = [switching.Entry.of(line) for line in one["log"]]
    assert switching.replay(handle.config, told) == told


@pytest.mark.parametrize("watch", [False, True])
def test_experts_on_the_spot_are_what_the_shards_keep(watch: bool, folder: Path) -> None:
    start = made("llama")[0].state_dict()
    for rank in range(2):
        found = torch.load(folder / f"spot-{rank}.pt")[watch]
        torch.testing.assert_close(found["dense"], found["before"], rtol=1e-4, atol=1e-5)
        assert float((found["sparse"] - found["before"]).abs().max()) > 1e-3
        for n, ids in enumerate(found["ids"]):
            assert not torch.equal(ids, torch.arange(64))
            for part, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                name = f"model.layers.{n}.mlp.{part}.weight"
                assert torch.equal(found["weights"][name], start[name].index_select(dim, ids)), name
