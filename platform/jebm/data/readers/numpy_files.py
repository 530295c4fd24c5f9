"""NumPy arrays: .npy, memory-mapped, and .npz, read in pieces."""

import contextlib
import dataclasses
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from jebm.data.members import is_label_file
from jebm.data.pixels import refitted
from jebm.data.readers.label_files import ArrayHeader, array_header, label_file, loaded_array
from jebm.data.source import (
    LABELS_LIMIT,
    Batch,
    Request,
    Source,
    SourceDescription,
    array_source,
    checked_labels,
    described,
    exactly,
    images_per_batch,
    passed_over,
)
from jebm.data.splits import chosen_part, name_parts, named_split, without_split
from jebm.errors import DataError
from jebm.untrusted import escaped

__all__ = ["open_npy"]

_WHOLE_BYTES_LIMIT = 1 << 30  # for an array that cannot be read in pieces
_LABELS = re.compile(r"(?<![a-z])(y|labels?|targets?|class(es)?)(?![a-z])")
_IMAGES = re.compile(r"(?<![a-z])(x|images?|imgs?|data|pixels)(?![a-z])")


def open_npy(path: Path, request: Request) -> Source:
    """Open an array of images (.npy), or images with labels (.npz); DataError if there is no such array."""
    if zipfile.is_zipfile(path):
        source = _npz_source(path, request)
    else:
        images = loaded_array(path)
        _check_images(images.shape, images.dtype, path)
        split, remarks = named_split(request.split, path)
        labels = None if request.labels is None else label_file(Path(request.labels), len(images))
        images_NHWC = images[..., None] if images.ndim == 3 else images
        source = array_source(escaped(path.stem), split, images_NHWC, labels, _description(path, request))
        beside = (
            []
            if request.labels
            else [p.name for p in path.parent.iterdir() if is_label_file(p.name) and p.is_file()]
        )
        source = dataclasses.replace(source, remarks=passed_over({}, beside) + remarks)
    return refitted(source, request.size, request.channels)


def _description(path: Path, request: Request) -> SourceDescription:
    files = [path, *([Path(request.labels)] if request.labels is not None else [])]
    return SourceDescription(tuple(described(file) for file in files), "npy")


def _check_images(shape: tuple[int, ...], dtype: np.dtype[Any], place: object) -> None:
    if dtype != np.uint8 or len(shape) not in {3, 4} or math.prod(shape) == 0:
        found = f"{dtype} {shape}"
        raise DataError(f"{place}: uint8 of shape (N, H, W) or (N, H, W, C) is needed, not {found}")
    if len(shape) == 4 and shape[1] in {1, 3} and shape[3] not in {1, 3}:
        raise DataError(f"{place}: {shape} has its channels first; they come last: transpose to (N, H, W, C)")


# ---------------------------------------------------------------------------------------------------- npz


@dataclass(frozen=True)
class _Stored:
    """An array in an archive."""

    archive: Path
    name: str
    header: ArrayHeader

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open the array, positioned after its header."""
        with zipfile.ZipFile(self.archive) as archive, archive.open(f"{self.name}.npy") as file:
            array_header(file, archive.getinfo(f"{self.name}.npy").file_size, self.place)
            yield file

    @property
    def place(self) -> str:
        return f"{self.archive}/{self.name}"

    def whole(self) -> npt.NDArray[Any]:
        header = self.header
        if header.bytes > _WHOLE_BYTES_LIMIT:
            raise DataError(f"{self.place}: {header.bytes} bytes in Fortran order; save it in C order")
        with self.opened() as file:
            values = np.frombuffer(exactly(file, header.bytes, self.place), header.dtype)
        return values.reshape(header.shape, order="F" if header.fortran else "C")


def _npz_source(path: Path, request: Request) -> Source:
    arrays, unusable = _stored(path)
    kept, split, remarks = _of_split(path, arrays, request.split)
    images = _images_among(path, kept, unusable)
    split = split or name_parts([images.name]).get(images.name, "train")
    # Labels: the file given, or the array named for labels.
    stored = _labels_among(kept, images) if request.labels is None else None
    labels = None if request.labels is None else label_file(Path(request.labels), images.header.shape[0])
    if stored is not None:
        labels = checked_labels(stored.whole().reshape(-1), stored.place)
    unused = sorted({*kept, *unusable} - {images.name, stored.name if stored is not None else ""})
    if unused:
        remarks += (f"arrays seen and not used: {', '.join(map(escaped, unused[:8]))}",)
    source = _streamed(images, labels, escaped(path.stem), split, _description(path, request))
    return dataclasses.replace(source, remarks=remarks)


def _stored(path: Path) -> tuple[dict[str, _Stored], dict[str, DataError]]:
    """Return an archive's arrays, and why others are unusable; only headers are read."""
    arrays, unusable = dict[str, _Stored](), dict[str, DataError]()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            try:
                with archive.open(info) as file:
                    arrays[name] = _Stored(path, name, array_header(file, info.file_size, f"{path}/{name}"))
            except DataError as error:
                unusable[name] = error
    return arrays, unusable


def _of_split(
    path: Path, arrays: dict[str, _Stored], asked: str | None
) -> tuple[dict[str, _Stored], str, tuple[str, ...]]:
    """Return a split's arrays, its name, and remarks; all arrays if none is named for a split."""
    meanings = name_parts(arrays)
    parts = Counter(meanings.values())
    if not parts:
        return arrays, *named_split(asked, path)
    if asked is None and len(parts) > 1:
        return arrays, "", ()  # fine if only one of them holds images
    place = f"{path} ({', '.join(map(escaped, arrays))})"
    part = chosen_part(asked, parts, place)
    shared = {part} if len(parts) > 1 else {part, None}
    return {name: array for name, array in arrays.items() if meanings.get(name) in shared}, asked or part, ()


def _images_among(path: Path, arrays: Mapping[str, _Stored], unusable: Mapping[str, DataError]) -> _Stored:
    """Return the one array of images, preferably one named so."""
    images = [a for a in arrays.values() if a.header.dtype == np.uint8 and len(a.header.shape) in {3, 4}]
    called = [array for array in images if _IMAGES.search(without_split(array.name))]
    chosen = called if len(called) == 1 else images
    if not chosen and unusable:
        raise next(iter(unusable.values()))
    if len(chosen) != 1:
        found = f"{len(chosen)} of {', '.join(map(escaped, arrays)) or 'none'}"
        raise DataError(f"{path}: one uint8 image array is needed, not {found}; give a split")
    _check_images(chosen[0].header.shape, chosen[0].header.dtype, chosen[0].place)
    return chosen[0]


def _labels_among(arrays: Mapping[str, _Stored], images: _Stored) -> _Stored | None:
    """Return the one array that is named for labels and has one per image."""
    number = images.header.shape[0]
    labels = [
        array
        for array in arrays.values()
        if array.header.shape in {(number,), (number, 1)}
        and array.header.dtype.kind in "iufb"
        and number <= LABELS_LIMIT
        and _LABELS.search(without_split(array.name))
        and name_parts([array.name]).get(array.name) in {None, name_parts([images.name]).get(images.name)}
    ]
    return labels[0] if len(labels) == 1 else None


def _streamed(
    images: _Stored,
    labels: npt.NDArray[np.int32] | None,
    name: str,
    split: str,
    description: SourceDescription,
) -> Source:
    """Return a source that reads its images in stored order."""
    number, height, width, channels = shape = (*images.header.shape, 1)[:4]
    if images.header.fortran:
        return array_source(name, split, images.whole().reshape(shape), labels, description)

    def read() -> Iterator[Batch]:
        step = images_per_batch((height, width, channels))
        with images.opened() as file:
            for start in range(0, number, step):
                count = min(step, number - start)
                data = exactly(file, count * height * width * channels, images.place)
                images_NHWC = np.frombuffer(data, np.uint8).reshape(count, height, width, channels)
                yield Batch(images_NHWC, None if labels is None else labels[start : start + count])
            while file.read(1 << 20):  # to verify the checksum
                pass

    return Source(name, split, height, width, channels, number, description, read)
