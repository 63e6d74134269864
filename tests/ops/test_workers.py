"""Work shared out over threads: every piece once, large ones first, errors raised, settings of the caller untouched."""

from __future__ import annotations

import threading

import pytest
import torch

from fallow.ops.workers import share_out


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_piece_once_and_none_of_size_zero():
    done, lock = [], threading.Lock()

    def work(piece, worker):
        assert worker in (0, 1) and not torch.is_grad_enabled()
        with lock:
            done.append(piece)

    sizes = [3, 0, 5, 1, 0, 2, 9]
    for inline in (False, True):
        done.clear()
        share_out(work, sizes, inline=inline)
        assert sorted(done) == [0, 2, 3, 5, 6]
    assert done == [6, 2, 0, 5, 3], "largest first"
    assert torch.is_grad_enabled() and torch.get_num_threads() == 2


def test_two_threads_work_at_once():
    both = threading.Barrier(2, timeout=20)

    def work(piece, worker):
        both.wait()

    share_out(work, [1, 1])


def test_an_error_is_raised_after_the_other_thread_has_finished():
    finished = threading.Event()
    failed = threading.Event()

    def work(piece, worker):
        if piece == 0:
            failed.set()
            raise ValueError("piece 0")
        failed.wait(20)
        finished.set()

    with pytest.raises(ValueError, match="piece 0"):
        share_out(work, [1, 1])
    assert finished.is_set()


def test_a_single_piece_or_thread_runs_in_the_caller():
    seen = []
    share_out(lambda piece, worker: seen.append(threading.current_thread()), [0, 4])
    torch.set_num_threads(1)
    share_out(lambda piece, worker: seen.append(threading.current_thread()), [4, 4])
    assert seen == [threading.current_thread()] * 3
