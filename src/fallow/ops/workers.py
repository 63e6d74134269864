"""Threads that share out independent pieces of work, each piece with its part of the cores for torch's own operators.

Many GEMMs of a few milliseconds each start and end a parallel region of their own, and each waits for its slowest
thread: on two cores that other processes use as well, 144 GEMMs of one FFN took 926 ms so and 144 ms on one thread.
Here a thread takes a whole piece, runs its operators by itself, and takes the next, the largest first; threads wait
for each other once per call. Cost: about 50 µs per call.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_making = threading.Lock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads


def _pool(workers: int, threads_each: int) -> ThreadPoolExecutor:
    with _making:
        found = _pools.get((workers, threads_each))
        if found is None:
            total, started = torch.get_num_threads(), threading.Barrier(workers)
            found = ThreadPoolExecutor(workers, thread_name_prefix="fallow")

            def start() -> None:
                torch.set_num_threads(threads_each)
                started.wait()

            for each in [found.submit(start) for _ in range(workers)]:
                each.result()
            torch.set_num_threads(total)  # it is the calling thread's own setting and the default of new ones
            _pools[workers, threads_each] = found
    return found


def share_out(work: Callable[[int, int], None], sizes: Sequence[int], *, inline: bool = False) -> None:
    """Call `work(piece, worker)` once for every piece of a size above 0, without gradients.

    Args:
        work: must touch only its own piece; `worker` numbers the thread, so that each can have its own buffers.
        sizes: relative cost of each piece; the largest start first.
        inline: in the calling thread, with all its cores: for work too small to be handed over.
    """
    order = sorted((i for i, size in enumerate(sizes) if size > 0), key=lambda i: -sizes[i])
    threads = torch.get_num_threads()
    workers = min(threads, len(order))
    if inline or workers < 2:
        with torch.no_grad():
            for piece in order:
                work(piece, 0)
        return
    left = deque(order)

    def loop(worker: int) -> None:
        with torch.no_grad():
            while True:
                try:
                    piece = left.popleft()
                except IndexError:
                    return
                work(piece, worker)

    for each in list(_pool(workers, threads // workers).map(partial(_caught, loop), range(workers))):
        if each is not None:
            raise each


def _caught(loop: Callable[[int], None], worker: int) -> Exception | None:
    """What went wrong, so that no thread still writes when the first error is raised."""
    try:
        loop(worker)
    except Exception as error:
        return error
    return None
