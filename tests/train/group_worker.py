"""One of two gloo processes: `group_worker.py RANK FOLDER HOW...` ends a group in each way, then itself.

Prints how many threads of gloo were left after each. No thread gets the interpreter lock but by a call
that blocks, so that what a thread of gloo has not dropped when the group ends, it would drop while the
interpreter ends, and abort.
"""

import sys
from contextlib import suppress

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from jebm.cli import log_lines
from jebm.train.group import process_group, running_loops

KEPT: list[DistributedDataParallel] = []


def backward() -> DistributedDataParallel:
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    model(torch.ones(2, 8)).sum().backward()
    return model


def end_with(how: str) -> None:
    if how == "backward":
        backward()
    elif how == "collective":
        backward()
        dist.all_reduce(torch.ones(3))
    elif how == "many at once":
        backward()
        works = [dist.all_reduce(torch.ones(3), async_op=True) for _ in range(8)]
        for work in works:
            work.wait()
    elif how == "error":
        model = backward()
        dist.all_reduce(torch.ones(3))
        raise ArithmeticError(f"while {type(model).__name__} is here")
    elif how == "kept":
        KEPT.append(backward())


def main() -> None:
    rank, folder, *ways = sys.argv[1:]
    log_lines()
    torch.set_num_threads(1)
    sys.setswitchinterval(100)
    for number, how in enumerate(ways):
        place = {"init_method": f"file://{folder}/{number}", "rank": int(rank), "world_size": 2}
        with suppress(ArithmeticError), process_group("gloo", **place):
            end_with(how)
        sys.stdout.write(f"{how}: {len(running_loops())}\n")


if __name__ == "__main__":
    main()
