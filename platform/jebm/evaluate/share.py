"""Split work on images into batches, and the batches among workers.

A batch's noise depends on its position, and results are combined in the order of the batches, so that they do
not depend on the number of workers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "BATCH", "Share", "group_share"]

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
