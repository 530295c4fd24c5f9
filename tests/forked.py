"""Ranks of a group as forks of one process, so that torch is imported once."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

LIMIT_SECONDS = 280


def exit_code(work: Callable[..., None], ranks: int, *arguments: Any) -> int:
    """Run `work(rank, *arguments)` in each of the ranks; return 0 if all ended well, within the limit."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank, *arguments)) for rank in range(ranks)]
    deadline = time.monotonic() + LIMIT_SECONDS
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)
