"""Sums that stay on the device between reports, and clocks that do not block it."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from jebm.train.runtime import Runtime

__all__ = ["Clock", "Meter"]


class Meter:
    """Means of metrics over steps and ranks, accumulated in float64 on the device."""

    def __init__(self) -> None:
        self._sizes: dict[str, torch.Size] = {}
        self._sums = torch.empty(0)
        """Of all names in the order of `_sizes`, each flat."""
        self.steps = 0
        """Steps added since the last `take`."""

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's metrics: () or (n,) tensors. One addition for all, unless a name is new."""
        sizes = {name: value.shape for name, value in metrics.items()}
        addend = torch.cat([value.reshape(-1) for value in metrics.values()]).double()
        if not self._sizes:
            self._sizes, self._sums = sizes, addend
        elif list(sizes) == list(self._sizes):
            self._sums = self._sums + addend
        else:  # for example, the energy joins
            sums, addends = _by_name(self._sums, self._sizes), _by_name(addend, sizes)
            self._sizes |= sizes
            both = [[each[name] for each in (sums, addends) if name in each] for name in self._sizes]
            self._sums = torch.cat([each[0] + each[1] if len(each) == 2 else each[0] for each in both])
        self.steps += 1

    def take(self, runtime: Runtime) -> dict[str, float]:
        """Return means since the last call, with one reduction over ranks; (n,) becomes name/1 … name/n."""
        values = iter(runtime.mean(self._sums / self.steps).tolist())
        means = {}
        for name, size in self._sizes.items():
            if not size:
                means[name] = next(values)
            else:
                means |= {f"{name}/{i}": next(values) for i in range(1, size.numel() + 1)}
        self._sizes, self.steps = {}, 0
        return means


def _by_name(flat: Tensor, sizes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    parts = torch.split(flat, [size.numel() for size in sizes.values()])
    return dict(zip(sizes, parts, strict=True))


class Clock:
    """Seconds spent under each name since the last `take`; on CUDA by events, read only in `take`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent within to `name`."""
        if self._cuda:
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began

    def take(self) -> tuple[float, dict[str, float]]:
        """Return (wall seconds, seconds by name) since the last call, and reset."""
        if self._cuda:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1000
        now = time.perf_counter()
        wall, named = now - self._started, dict(self._seconds)
        self._started, self._seconds, self._events = now, defaultdict(float), []
        return wall, named
