"""How fast a place takes checkpoints and gives them back."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from jebm.store.retrieve import RunStore
from jebm.store.stream import restore_tensors, upload_tensors

__all__ = ["Throughput", "measure"]


@dataclass(frozen=True)
class Throughput:
    """What a place takes and gives: seconds of wall clock, and of this process's CPU."""

    size: int
    upload_seconds: float
    upload_cpu_seconds: float
    download_seconds: float
    download_cpu_seconds: float


def measure(run: RunStore, size: int) -> Throughput:
    """Write random tensors of `size` bytes beside the run's checkpoints, read them back, delete them.

    Raises StoreError where the place cannot be written, CheckpointError where it does not give back what it
    was given.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"bench.{number}": torch.randint(-(2**62), 2**62, (length // 8,), generator=generator)
        for number, length in enumerate(_lengths(size))
    }
    key = f"{run.name}/checkpoints/bench-{uuid.uuid4().hex}/data.safetensors"  # no checkpoint's name
    try:
        began, cpu = time.perf_counter(), time.process_time()
        stored = upload_tensors(run.root, key, tensors)
        upload_seconds, upload_cpu = time.perf_counter() - began, time.process_time() - cpu
        began, cpu = time.perf_counter(), time.process_time()
        restore_tensors(run.root, [stored], tensors)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    finally:
        run.root.delete([key])
    return Throughput(stored.size, upload_seconds, upload_cpu, seconds, cpu_seconds)


def _lengths(size: int) -> Iterator[int]:
    """Yield lengths of up to 64 MiB that come to `size`, or to the multiple of 8 below it, 8 at least."""
    left = max(size, 8)
    while left >= 8:
        yield min(left, 64 << 20)
        left -= min(left, 64 << 20)
