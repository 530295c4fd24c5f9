"""Batches addressed by global step: the same step gives the same images, whatever ran before.

Shapes: N images of the set, B images of this rank's batch, C channels, H rows, W columns.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jebm.data.dataset import ImageSet
from jebm.data.windows import Windows
from jebm.errors import ConfigError, DataError
from jebm.rng import generator

__all__ = ["Loader", "to_float", "to_uint8", "upload"]


class Loader:
    """A data set's images in a new order each epoch, split into global batches and then among ranks.

    `images` are all in the cache, or windows of them are.

    `batch_size` is the global batch size B: rank r of W gets the images from floor(r B / W) to before
    floor((r + 1) B / W). Raises ConfigError if a rank would get none, DataError if the set holds less than
    one batch.
    """

    def __init__(
        self,
        images: ImageSet | Windows,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device | str,
    ) -> None:
        if batch_size < max(1, world_size):
            raise ConfigError(
                f"train.batch_size: {batch_size} images cannot be shared by {world_size} workers"
            )
        count = len(images.images_NHWC) if isinstance(images, ImageSet) else images.manifest.images
        if batch_size > count:
            name = f"{images.manifest.name} ({images.manifest.split})"
            raise DataError(
                f"{name}: {count} images are less than one batch; set train.batch_size to ≤ {count}"
            )
        self.steps_per_epoch = count // batch_size  # the rest is left out of this epoch
        self._images, self._count = images, count
        self._batch_size = batch_size
        self._first, self._end = (each * batch_size // world_size for each in (rank, rank + 1))
        self._seed, self._device = seed, torch.device(device)
        self._epoch = -1
        self._order_N: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def batch(self, step: int) -> Tensor:
        """Return this rank's images of global step `step` ≥ 0: float32 (B, C, H, W) in [−1, 1], contiguous.

        Concatenated in rank order they form the global batch, so the world size may change.
        """
        rows_B = self.rows(step)
        if isinstance(self._images, ImageSet):
            return to_float(self._images.images_NHWC[rows_B], self._device)
        return to_float(self._images.take(*self._place(step), rows_B), self._device)

    def needs_preparing(self, step: int) -> bool:
        """Return whether `prepare(step)` must come before `batch(step)`: the same on every rank."""
        images, size = self._images, self._batch_size
        return isinstance(images, Windows) and (
            step == 0
            or images.touched(*self._place(step - 1), size) != images.touched(*self._place(step), size)
        )

    def prepare(self, step: int) -> None:
        """Wait for the images of `batch(step)` on any rank; raises what `Windows.take` raises."""
        if isinstance(self._images, Windows):
            self._images.prepare(*self._place(step), self._batch_size)

    def close(self) -> None:
        """Decode nothing ahead any more."""
        if not isinstance(self._images, ImageSet):
            self._images.close()

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return the indices of the images in `batch(step)`, (B,)."""
        epoch, start = self._place(step)
        if epoch != self._epoch:
            self._order_N = self._order(epoch)
            self._epoch = epoch
        return self._order_N[start + self._first : start + self._end]

    def _place(self, step: int) -> tuple[int, int]:
        """Return a step's epoch, and where in the epoch's order its global batch begins."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch, position * self._batch_size

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the permutation of one epoch, the same on every rank."""
        if not isinstance(self._images, ImageSet):
            return self._images.order(epoch)
        stream = generator(self._seed, rank=0, position=epoch, purpose="data order")
        order_N: npt.NDArray[np.int64] = torch.randperm(self._count, generator=stream).numpy()
        return order_N


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on the device, without waiting for what a GPU computes before."""
    # From pageable memory a copy waits for the GPU. torch keeps pinned memory until it has been read.
    on_cuda = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if on_cuda else tensor.to(device)


def to_float(pixels_BHWC: npt.NDArray[np.uint8], device: torch.device | str) -> Tensor:
    """Return x/127.5 − 1: float32 (B, C, H, W) in [−1, 1], contiguous, on the device."""
    # Send bytes to the device: a quarter of the floats' size, and cheaper to transpose.
    pixels_BCHW = upload(torch.from_numpy(pixels_BHWC), device).permute(0, 3, 1, 2).contiguous()
    # CUDA turns division by a number into multiplication by its reciprocal; by a tensor it divides like the
    # CPU.
    half_range = torch.full((), 127.5, device=pixels_BCHW.device)
    return pixels_BCHW.to(torch.float32).div_(half_range).sub_(1)


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """Return pixels 0 … 255, uint8, of the same shape: the inverse of x/127.5 − 1, rounded and clamped."""
    return x_BCHW.to(torch.float32).add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
