"""Two (or more) gloo ranks as processes of this machine, for the tests of sharded training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(worker: Callable[..., None], *args: object, folder: Path, world: int = 2) -> None:
    """Run `worker(rank, *args)` in `world` spawned processes with a gloo group; an error of any of them is raised here.

    The ranks meet through a file in `folder`, so that no port can be taken by another process between choice and use.
    """
    mp.start_processes(_rank, (worker, world, str(folder / "meeting"), args), nprocs=world, start_method="spawn")


def _rank(rank: int, worker: Callable[..., None], world: int, meeting: str, args: tuple[object, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    worker(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    # A sharded model keeps its group, and that its threads, alive into interpreter shutdown, where torch now and then
    # ends in std::terminate (pytorch/pytorch#179291, #190489). Everything worth checking is done: leave without it.
    os._exit(0)
