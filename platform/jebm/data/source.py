"""What every reader of original files returns: images of one shape, in order, in bounded memory.

A reader treats its file as untrusted: lengths are checked against headers, nothing is inflated beyond its
declared size, and nothing is unpickled. A file that cannot be read gives one `DataError` line naming it. A
reader reports what it skips (`Source.remarks`).

Shapes: N images, H rows, W columns, C channels (1 grey, 3 RGB), F factors.
"""

import contextlib
import gzip
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from jebm.data.factors import Factor
from jebm.errors import DataError, JebmError
from jebm.untrusted import escaped

__all__ = [
    "BATCH_IMAGES",
    "IMAGE_PIXELS_LIMIT",
    "LABELS_LIMIT",
    "Batch",
    "File",
    "Reader",
    "Request",
    "Shape",
    "Source",
    "SourceDescription",
    "SourceFile",
    "array_source",
    "checked_labels",
    "counted",
    "damage_is_named",
    "damaged",
    "described",
    "exactly",
    "images_per_batch",
    "leaving_out",
    "limited",
    "passed_over",
    "source_from_arrays",
    "what_failed",
]

_BATCH_BYTES = 16 << 20  # of pixels: large enough to vectorise, small enough to hold several at once
BATCH_IMAGES = 1024
IMAGE_PIXELS_LIMIT = 64 << 20
LABELS_LIMIT = 64 << 20
_LARGEST_LABEL = 2**31 - 1

Shape = tuple[int, int, int]  # height, width, channels
File = IO[bytes] | gzip.GzipFile


@dataclass(frozen=True)
class Batch:
    """Consecutive images of a source; labels come from `checked_labels`."""

    images_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int32] | None = None  # −1 for an image without one; None if none has
    factors_NF: npt.NDArray[np.int32] | None = None  # indices into the categories of the source's factors

    def rows(self, taken: npt.NDArray[np.bool_] | slice) -> "Batch":
        """Return some of the images, with what belongs to them."""
        return Batch(
            self.images_NHWC[taken],
            None if self.labels_N is None else self.labels_N[taken],
            None if self.factors_NF is None else self.factors_NF[taken],
        )


@dataclass(frozen=True)
class SourceFile:
    """One original file (or folder of image files), to trace a data set back to it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceDescription:
    """What a data set was made from, and how its pixels were transformed."""

    files: tuple[SourceFile, ...]
    format: str
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Images of one fixed shape that can be read repeatedly."""

    name: str
    split: str
    height: int
    width: int
    channels: int
    images: int | None  # None if unknown before reading
    description: SourceDescription
    read: Callable[[], Iterator[Batch]] = field(repr=False, compare=False)
    remarks: tuple[str, ...] = field(default=(), compare=False)  # for people: what was skipped, and why
    factors: tuple[Factor, ...] = ()

    def batches(self) -> Iterator[Batch]:
        """Yield the images in order; DataError if a file turns out to be damaged."""
        with damage_is_named(self.description.files[0].name if self.description.files else self.name):
            yield from self.read()


@dataclass(frozen=True)
class Request:
    """The user's options for a source, besides its path and what is left out of it."""

    split: str | None
    labels: str | None
    partition: Path | None
    size: int | None
    channels: int | None


class Reader(ABC):
    """Reads original files of the user's own format."""

    def __init__(self, path: Path) -> None:
        """Take the file or folder."""
        self.path = path

    @abstractmethod
    def images(self) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
        """Yield each image with its label, or -1 for none, in an order that is always the same.

        An image is uint8, (H, W) if grey or (H, W, 3), all of one shape. Each call begins anew; hold a few
        images at a time, since a data set need not fit in memory.
        """


def checked_labels(labels: npt.ArrayLike, place: object) -> npt.NDArray[np.int32]:
    """Return labels as int32: ≥ 0, or −1 for none; accepts whole numbers of any type, and NaN as none.

    Raises DataError, naming `place`, for anything else, which int32 would turn into another label.
    """
    array = np.asarray(labels)
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), -1, array)
        if not (array == np.rint(array)).all():
            raise DataError(f"{place}: labels must be whole numbers, not {array[array != np.rint(array)][0]}")
    elif array.dtype.kind not in "iub":
        raise DataError(f"{place}: labels must be whole numbers, not {array.dtype}")
    if array.size and not -1 <= array.min() <= array.max() <= _LARGEST_LABEL:
        worst = array.min() if array.min() < -1 else array.max()
        raise DataError(
            f"{place}: label {worst} is outside 0 to {_LARGEST_LABEL} (-1: none); number them anew"
        )
    return array.astype(np.int32)


def source_from_arrays(
    images_NHWC: npt.NDArray[np.uint8],
    labels_N: npt.NDArray[np.integer[Any]] | None = None,
    *,
    name: str,
    split: str = "train",
    description: SourceDescription | None = None,
) -> Source:
    """Return a `Source` over uint8 (N, H, W, C) in memory, for generated images and custom subsets."""
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4:
        raise DataError(f"{name}: uint8 (N, H, W, C) is needed, not {images_NHWC.dtype} {images_NHWC.shape}")
    if labels_N is not None and labels_N.shape != images_NHWC.shape[:1]:
        raise DataError(f"{name}: labels of shape {labels_N.shape} do not fit {len(images_NHWC)} images")
    return array_source(name, split, images_NHWC, labels_N, description or SourceDescription((), "arrays"))


def array_source(
    name: str,
    split: str,
    images_NHWC: npt.NDArray[Any],
    labels: npt.NDArray[Any] | None,
    description: SourceDescription,
) -> Source:
    """Return a source over a uint8 array (N, H, W, C)."""
    images, height, width, channels = images_NHWC.shape
    labels_N = None if labels is None else checked_labels(labels, name)

    def read() -> Iterator[Batch]:
        step = images_per_batch((height, width, channels))
        for start in range(0, images, step):
            of_batch = None if labels_N is None else labels_N[start : start + step]
            yield Batch(np.ascontiguousarray(images_NHWC[start : start + step]), of_batch)

    return Source(name, split, height, width, channels, images, description, read)


@contextlib.contextmanager
def damage_is_named(path: str | Path) -> Iterator[None]:
    """Turn whatever a library raises while it reads an untrusted file into one DataError line.

    It catches everything: no list of exceptions covers what a fuzzed file triggers in a decoder.
    """
    try:
        yield
    except JebmError:
        raise
    except Exception as error:
        raise DataError(f"{path}: {what_failed(error)}") from error


def what_failed(error: Exception) -> str:
    """Return one line on why a file cannot be read, with the remedy."""
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    if isinstance(error, MemoryError):
        return "needs more memory than this machine gives; give smaller files"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({reason})"
    return f"cannot be read ({reason}); fetch the original file again"


def damaged(path: Path | str, what: str) -> DataError:
    """Return the error for a damaged file."""
    return DataError(f"{path}: {what}; fetch the original file again")


def described(path: Path) -> SourceFile:
    """Return a file's name, size and hash."""
    with path.open("rb") as file:
        return SourceFile(
            escaped(path.name), path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
        )


def exactly(file: File, count: int, path: Path | str) -> bytes:
    """Read exactly `count` bytes; DataError if there are fewer."""
    data = file.read(count)
    if len(data) != count:
        raise damaged(path, f"truncated ({len(data)} of {count} bytes left)")
    return data


def images_per_batch(shape: Shape) -> int:
    """Return how many images of this shape make a batch."""
    return max(1, min(BATCH_IMAGES, _BATCH_BYTES // math.prod(shape)))


def limited(source: Source, limit: int) -> Source:
    """Return a source limited to the first images."""
    if source.images is not None and source.images <= limit:
        return source

    def read() -> Iterator[Batch]:
        left = limit
        for batch in source.read():
            yield batch.rows(slice(left))
            left -= len(batch.images_NHWC)
            if left <= 0:
                return

    transforms = (*source.description.transforms, f"first {limit} images")
    # An unknown count stays unknown: the source may be shorter than the limit.
    images = None if source.images is None else limit
    return replace(
        source, images=images, description=replace(source.description, transforms=transforms), read=read
    )


def leaving_out(source: Source, label: int) -> Source:
    """Return a source without the images of one label."""

    def read() -> Iterator[Batch]:
        met = False
        for batch in source.read():
            if batch.labels_N is None:
                raise DataError(f"{source.name}: its images have no labels; without_label needs them")
            kept = batch.labels_N != label
            met = met or not kept.all()
            if kept.any():
                yield batch.rows(kept)
        if not met:
            raise DataError(f"{source.name}: no image has label {label}; without_label must name one")

    transforms = (*source.description.transforms, f"without label {label}")
    return replace(
        source, images=None, description=replace(source.description, transforms=transforms), read=read
    )


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: `1 image` or `2,000 images`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def passed_over(reasons: Mapping[str, int], label_files: Iterable[str] = ()) -> tuple[str, ...]:
    """Return remarks on skipped files: a count per reason; label files by name."""
    kinds = sorted(reasons.items(), key=lambda kind: (-kind[1], kind[0]))
    words = [f"{number:,} {reason}" for reason, number in kinds]
    remarks = () if not words else (f"passed over: {_listed(words, 12)}",)
    names = sorted(label_files)
    return remarks if not names else (*remarks, f"seen and not used as labels: {_listed(names, 4)}")


def _listed(words: Sequence[str], most: int) -> str:
    more = [f"{len(words) - most:,} more"] if len(words) > most else []
    return ", ".join([*(escaped(word) for word in words[:most]), *more])
