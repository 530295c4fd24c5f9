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
        self._sums: dict[str, Tensor] = {}
        self.steps = 0
        """Steps added since the last `take`."""

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's metrics: () or (n,) tensors."""
        for name, value in metrics.items():
            addend = value.double()
            self._sums[name] = self._sums[name] + addend if name in self._sums else addend
        self.steps += 1

    def take(self, runtime: Runtime) -> dict[str, float]:
        """Return means since the last call, with one reduction over ranks; (n,) becomes name/1 … name/n."""
        names = list(self._sums)
        flat = torch.cat([self._sums[name].reshape(-1) for name in names]) / self.steps
        values = iter(runtime.mean(flat).tolist())
        means = {}
        for name in names:
            if self._sums[name].dim() == 0:
                means[name] = next(values)
            else:
                means |= {f"{name}/{i}": next(values) for i in range(1, len(self._sums[name]) + 1)}
        self._sums, self.steps = {}, 0
        return means


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
