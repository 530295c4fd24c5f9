"""One of two ranks that meet in every step; one stands still, in step 3 or at once, in the way asked for."""

import ctypes
import os
import signal
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist

from jebm.cli import log_lines
from jebm.train.group import process_group
from jebm.train.runtime import member_runtime
from jebm.train.watch import Watch

rank, meeting, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
stands_in = 0 if way == "at once" else 3
stands_still = 0 if way.startswith("keeper") else 1
log_lines()


def stand_still() -> None:
    if way == "thread":
        time.sleep(600)
    elif way == "gil":
        ctypes.PyDLL(None).sleep(600)  # called without giving the GIL away
    elif way != "no":
        os.kill(os.getpid(), signal.SIGSTOP)


with (
    process_group("gloo", init_method=meeting, rank=rank, world_size=2),
    member_runtime(rank, 2, torch.device("cpu"), supervised=True) as runtime,
    Watch(runtime, 4.0, lambda: False) as watch,
):
    for step in range(5):
        watch.at(step, "images")
        if step == 1:
            with watch.busy("an evaluation"):
                time.sleep(10 * rank)  # longer than the limit, on one rank: no hang
        if rank == stands_still and step == stands_in:
            stand_still()
        watch.at(step, "update")
        with watch.busy("a save") if way == "keeper, others busy" and step == 3 else nullcontext():
            dist.all_reduce(torch.ones(1))
        print("step", step, flush=True)
print("end", flush=True)
