"""Label files, and the idx and NumPy headers that they share with image files."""

import gzip
import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from jebm.data.source import IMAGE_PIXELS_LIMIT, LABELS_LIMIT, File, checked_labels, damaged, exactly
from jebm.errors import DataError

__all__ = ["ArrayHeader", "array_header", "idx_file", "idx_header", "label_file", "loaded_array"]

_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_ARRAY_HEADER_LIMIT = 10_000  # NumPy's own
_GZIP = b"\x1f\x8b"


def label_file(path: Path, images: int) -> npt.NDArray[np.int32]:
    """Return the labels of an idx or .npy file; DataError unless it holds one number per image."""
    if not path.is_file():
        raise DataError(f"{path}: no such label file")
    if path.suffix == ".npy":
        labels = loaded_array(path)
    else:
        with idx_file(path) as file:
            dtype, dimensions = idx_header(file, path)
            if math.prod(dimensions) > LABELS_LIMIT:
                raise DataError(f"{path}: not an idx file of labels (dimensions {dimensions})")
            data = exactly(file, math.prod(dimensions) * dtype.itemsize, path)
            labels = np.frombuffer(data, dtype).reshape(dimensions)
            if file.read(1):
                raise damaged(path, "longer than its header says")
    if labels.ndim == 0 or labels.size != images or len(labels) != images:
        found = f"{labels.size} labels of shape {labels.shape}"
        raise DataError(f"{path}: {found} for {images} images; give the matching file")
    return checked_labels(labels.reshape(-1), path)


# ---------------------------------------------------------------------------------------------------- idx


def idx_file(path: Path) -> File:
    """Open an idx file, gzipped or not; DataError if it is gzipped twice."""
    with path.open("rb") as file:
        if file.read(2) != _GZIP:
            return path.open("rb")
    with gzip.open(path) as inflated:
        if inflated.read(2) == _GZIP:
            raise DataError(f"{path}: compressed twice; gunzip it once")
    return gzip.open(path)


def idx_header(file: File, path: Path) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Read an idx file's header and return the dtype of its numbers and its dimensions."""
    magic = exactly(file, 4, path)
    if magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not 1 <= magic[3] <= 4:
        raise DataError(f"{path}: not an idx file (it begins {magic.hex()})")
    dimensions = struct.unpack(f">{magic[3]}I", exactly(file, 4 * magic[3], path))
    if math.prod(dimensions[1:]) > 3 * IMAGE_PIXELS_LIMIT:
        raise damaged(path, f"its header claims images of {dimensions[1:]} pixels")
    return np.dtype(_IDX_TYPES[magic[2]]), dimensions


# -------------------------------------------------------------------------------------------------- NumPy


@dataclass(frozen=True)
class ArrayHeader:
    """The header of a .npy file."""

    shape: tuple[int, ...]
    fortran: bool  # the first index varies fastest
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """The number of bytes that must follow."""
        return math.prod(self.shape) * self.dtype.itemsize


def array_header(file: IO[bytes], size: int, place: Path | str) -> ArrayHeader:
    """Read the header of a .npy file of `size` bytes; DataError if other data follows than it claims."""
    start = exactly(file, 12, place)
    if start[:6] != b"\x93NUMPY":
        raise damaged(place, "not a NumPy array")
    # The header's length takes two bytes in version 1, four in later ones; version 3 is for field names.
    wide = start[6] != 1
    length = int.from_bytes(start[8:12] if wide else start[8:10], "little")
    if start[6] not in {1, 2} or length > _ARRAY_HEADER_LIMIT:
        raise DataError(f"{place}: not a plain NumPy array (version {start[6]}, header of {length} bytes)")
    head = io.BytesIO(start[8:] + exactly(file, length - (0 if wide else 2), place))
    try:
        read = np.lib.format.read_array_header_2_0 if wide else np.lib.format.read_array_header_1_0
        header = ArrayHeader(*read(head))
    except Exception as error:  # NumPy evaluates a literal, which can fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{place}: not a plain NumPy array ({reason})") from error
    if header.dtype.hasobject or header.dtype.fields:
        raise DataError(f"{place}: not a plain NumPy array (it holds {header.dtype})")
    there = size - (12 if wide else 10) - length
    if min(header.shape, default=0) < 0 or header.bytes > there:
        raise damaged(place, f"its header claims {header.bytes} bytes of {header.dtype}, {there} are there")
    if header.bytes < there:
        raise damaged(place, "longer than its header says")
    return header


def loaded_array(path: Path) -> npt.NDArray[Any]:
    """Memory-map a .npy file."""
    with path.open("rb") as file:
        array_header(file, path.stat().st_size, path)
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
