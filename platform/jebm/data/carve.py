"""Hold some images of a source back, so that choices can be made on images that no net is trained on.

Which ones depends on nothing but their positions: the same source is carved alike on every machine.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from jebm.data.source import Batch, Source
from jebm.errors import ConfigError

__all__ = ["VALIDATION", "carved", "held_back"]

VALIDATION = "validation"
"""The split that choices are made on: the name in a manifest, and of a folder."""


def held_back(images: int, count: int) -> npt.NDArray[np.bool_]:
    """Return for each of `images` positions whether it is one of the `count` that are held back.

    Those are the positions whose SHA-256 (of the position as 8 bytes, little-endian) is smallest.
    """
    hashes = b"".join(hashlib.sha256(i.to_bytes(8, "little")).digest()[:8] for i in range(images))
    chosen = np.argsort(np.frombuffer(hashes, ">u8"), kind="stable")[:count]
    is_held_N = np.zeros(images, bool)
    is_held_N[chosen] = True
    return is_held_N


def carved(source: Source, count: int) -> tuple[Source, Source]:
    """Return the source without `count` of its images, and those images, split validation.

    Reads the source once if its number of images is unknown.

    Raises ConfigError unless at least one image is held back and one is left.
    """
    images = source.images
    if images is None:
        images = sum(len(batch.images_NHWC) for batch in source.batches())
    if not 1 <= count < images:
        raise ConfigError(
            f"validation: {count} of {images:,} images cannot be held back; give 1 to {images - 1}"
        )
    is_held_N = held_back(images, count)
    words = f"the {count} of {images} held back by hash of position"
    rest = _part(source, ~is_held_N, source.split, f"without {words}")
    return rest, _part(source, is_held_N, VALIDATION, words)


def _part(source: Source, is_taken_N: npt.NDArray[np.bool_], split: str, words: str) -> Source:
    """Return the images of a source at the positions that are taken."""

    def read() -> Iterator[Batch]:
        start = 0
        for batch in source.read():
            taken = is_taken_N[start : start + len(batch.images_NHWC)]
            start += len(batch.images_NHWC)
            if taken.any():
                yield batch.rows(taken)

    transforms = (*source.description.transforms, words)
    return replace(
        source,
        split=split,
        images=int(is_taken_N.sum()),
        description=replace(source.description, transforms=transforms),
        read=read,
    )
