"""Split work on images into batches, and the batches among workers.

A batch's noise depends on its position, and results are combined in the order of the batches, so that they do
not depend on the number of workers.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "BATCH", "Ranks", "Share", "group_share", "share_of"]

T = TypeVar("T")

BATCH = 250
"""Images per batch; fixed, since an image's noise depends on it."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Share:
    """One worker's share of the work: the batches rank, rank + world_size and so on.

    `total` returns the sum of a floating-point tensor on the CPU over all workers; all must call it equally
    often.
    """

    rank: int = 0
    world_size: int = 1
    total: Callable[[Tensor], Tensor] = _same

    def batches(self, images: int) -> Iterator[tuple[int, slice]]:
        """Yield position and range of each of this worker's batches of `images` images."""
        for position in range(self.rank, -(-images // BATCH), self.world_size):
            yield position, slice(position * BATCH, min(images, (position + 1) * BATCH))


class Ranks(Protocol):
    """The workers of a training run, as an evaluation sees them (`jebm.train.runtime.Runtime`)."""

    @property
    def rank(self) -> int:
        """Which worker it is, from 0."""

    @property
    def world_size(self) -> int:
        """How many workers there are."""

    def added(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers of a tensor on the CPU."""

    def together(self) -> AbstractContextManager[None]:
        """Raise a `JebmError` of any worker on all; within, workers do not wait for one another."""

    def from_main(self, value: T) -> T:
        """Return rank 0's value on every worker."""


def share_of(ranks: Ranks) -> Share:
    """Return this worker's share of an evaluation that all workers of a run take part in."""
    return Share(ranks.rank, ranks.world_size, ranks.added)


ALONE = Share()
"""One worker that does all the work."""


def group_share() -> Share:
    """Return this process's share of the work in torch.distributed's group (gloo); all of it without one."""
    if not dist.is_initialized():
        return ALONE

    def total(tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    return Share(dist.get_rank(), dist.get_world_size(), total)
