"""`in_parallel`: many calls at once, in order, and never in the way of a process that ends."""

import subprocess
import sys
import threading

import pytest

from jebm.store.protocol import PART_THREADS, in_parallel


def test_results_come_in_order_from_several_threads() -> None:
    together = threading.Barrier(PART_THREADS)  # passes only if so many run at once

    def work(index: int, item: str) -> tuple[int, str]:
        together.wait(timeout=60)
        return index, item

    items = "abcdefgh"[:PART_THREADS]
    assert in_parallel(work, items) == list(enumerate(items))
    assert in_parallel(work, "") == []


def test_after_a_failure_no_further_call_starts_and_the_running_ones_end() -> None:
    begun, ended, failed = [], [], threading.Event()

    def work(index: int, _: int) -> None:
        begun.append(index)
        if index == 0:
            failed.set()
            raise ValueError("the first")
        failed.wait(timeout=60)
        while threading.active_count() > before + PART_THREADS - 1:  # the thread that failed has ended
            pass
        ended.append(index)

    before = threading.active_count()
    with pytest.raises(ValueError, match="the first"):
        in_parallel(work, range(100))
    assert sorted(ended) == sorted(set(begun) - {0})
    assert len(begun) <= PART_THREADS


def test_a_process_that_ends_waits_for_no_call() -> None:
    """Where a storage is away a call may take minutes, and what saves in the background is a daemon."""
    code = """
import threading, time
from jebm.store.protocol import in_parallel
begun = threading.Event()
work = lambda *_: (begun.set(), time.sleep(600))
threading.Thread(target=in_parallel, args=(work, [1, 2]), daemon=True).start()
begun.wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
