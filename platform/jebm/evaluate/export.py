"""Samples of the prior as files: single pictures, pages of many, or arrays with their latents.

A batch's noise depends on its position, and batches have a fixed size: the first samples of a seed are the
same however many follow and in whatever format, and memory does not grow with their number.

Shapes: N samples of a batch, C channels, H height, W width, D latent width of all
layers.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from jebm.config import Langevin
from jebm.core.model import JointModel
from jebm.core.prior import sample_prior
from jebm.data.loader import to_uint8
from jebm.errors import ConfigError
from jebm.evaluate.hierarchy import resample_layer
from jebm.evaluate.share import BATCH
from jebm.rng import Noise
from jebm.store.protocol import in_parallel
from jebm.store.storage import Store

__all__ = ["Drawn", "Format", "draw", "write"]

Format = Literal["grid", "png", "npz"]

_BATCHES = 20  # of an .npz
_WHITE = 255

_Arrays: TypeAlias = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]


class Drawn(NamedTuple):
    """A batch of samples."""

    x_NCHW: Tensor
    """Images in [-1, 1]."""
    z_ND: Tensor
    """The latents of all layers, bottom layer first."""


@torch.no_grad()
def draw(
    model: JointModel,
    config: Langevin,
    samples: int,
    noise: Noise,
    *,
    columns: int = 10,
    vary: int | None = None,
) -> Iterator[Drawn]:
    """Yield `samples` samples of the prior in batches of whole rows, about `BATCH` samples each.

    With `vary`, a layer (0 = bottom), the samples of a row share all layers but that one, which is drawn from
    its prior given the others (paper, hierarchical sampling). Raises ConfigError if samples are not finite.
    """
    size = max(1, BATCH // columns) * columns
    for position, first in enumerate(range(0, samples, size)):
        normal = noise(position, "exported prior samples")
        # Always a whole batch, so that the last samples do not depend on how many there are.
        z_ND, _ = sample_prior(model, config, size if vary is None else size // columns, normal)
        if vary is not None:
            z_ND = z_ND.repeat_interleave(columns, 0)
            z_ND = resample_layer(model, z_ND, vary, config, normal, source="conditional")
        wanted = slice(samples - first)
        x_NCHW, z_ND = model.decode(z_ND)[wanted], z_ND[wanted]
        if not x_NCHW.isfinite().all():
            raise ConfigError(
                f"samples are not finite: the weights are not, or chains diverge at langevin.step_size "
                f"{config.step_size:g}; reduce it"
            )
        yield Drawn(x_NCHW, z_ND)


def write(
    drawn: Iterable[Drawn], form: Format, output: Store, *, columns: int, latent_dims: Sequence[int]
) -> int:
    """Write the samples as they arrive, and return the number of files.

        grid   page-00000.png …: a batch each, in rows of `columns`
        png    00000000.png …: one sample each
        npz    samples-00000.npz …: 20 batches each: images (N, H, W, C), uint8, and z1 … zL, float32

    Raises StoreError if the output cannot be written.
    """
    files = 0
    # One file per sample for png, per batch for grid, per `_BATCHES` batches for npz.
    arrays = map(_arrays, drawn)
    for images_NHWC, z_ND in arrays if form != "npz" else _together(arrays):
        if form == "png":

            def put(index: int, image_HWC: npt.NDArray[np.uint8], first: int = files) -> None:
                output.put(f"{first + index:08d}.png", _png(image_HWC))

            in_parallel(put, list(images_NHWC))
            files += len(images_NHWC)
            continue
        if form == "grid":
            output.put(f"page-{files:05d}.png", _png(_page(images_NHWC, columns)))
        else:
            output.put(f"samples-{files:05d}.npz", _npz(images_NHWC, z_ND, latent_dims))
        files += 1
    return files


def _arrays(drawn: Drawn) -> _Arrays:
    """Return a batch's pixels, uint8, and its latents."""
    return to_uint8(drawn.x_NCHW).permute(0, 2, 3, 1).cpu().numpy(), drawn.z_ND.cpu().numpy()


def _together(batches: Iterator[_Arrays]) -> Iterator[_Arrays]:
    """Yield the samples of `_BATCHES` batches at a time."""
    while part := list(islice(batches, _BATCHES)):
        images, latents = zip(*part, strict=True)
        yield np.concatenate(images), np.concatenate(latents)


def _page(images_NHWC: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    """Return the images in rows with a white line between them, (height, width, C)."""
    missing = -len(images_NHWC) % columns
    padding = ((0, missing), (0, 1), (0, 1), (0, 0))
    padded_NHWC = np.pad(images_NHWC, padding, constant_values=_WHITE)
    height, width, channels = padded_NHWC.shape[1:]
    rows = padded_NHWC.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    return rows.reshape(-1, columns * width, channels)[:-1, :-1]


def _png(image_HWC: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC).save(file, "PNG")
    return file.getvalue()


def _npz(
    images_NHWC: npt.NDArray[np.uint8], z_ND: npt.NDArray[np.float32], latent_dims: Sequence[int]
) -> memoryview:
    layers = np.split(z_ND, list(accumulate(latent_dims))[:-1], axis=1)
    arrays: dict[str, Any] = {f"z{index}": layer for index, layer in enumerate(layers, 1)}
    file = io.BytesIO()
    np.savez(file, images=images_NHWC, **arrays)
    return file.getbuffer()
