"""A reader of numeric variables in MATLAB v5 files (SVHN's format), safe on untrusted files.

It inflates piece by piece and never beyond what a variable's header declares, so a file cannot make it use
more memory than its caller asks for. Everything but plain numeric arrays is skipped.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from jebm.errors import DataError

__all__ = ["Variable", "values", "variables"]

_COMPRESSED, _MATRIX = 15, 14
_NUMERIC_CLASSES = range(6, 16)
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_STORED_BYTES = 1 << 16  # read and inflated at a time


@dataclass(frozen=True)
class Variable:
    """A numeric array in a file: its shape (first index fastest), stored type and position."""

    dimensions: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    size: int
    compressed: bool


def variables(path: Path) -> dict[str, Variable]:
    """Return a file's numeric variables by name; DataError if it is not a complete MATLAB v5 file."""
    found: dict[str, Variable] = {}
    with path.open("rb") as file:
        order = _byte_order(file, path)
        while tag := file.read(8):
            if len(tag) != 8:
                raise _damaged(path)
            kind, size = struct.unpack(order + "II", tag)
            offset = file.tell()
            if kind in {_COMPRESSED, _MATRIX}:
                element = _Element(file, size, path, compressed=kind == _COMPRESSED)
                if (header := _header(element, order)) is not None:
                    name, dimensions, dtype = header
                    found[name] = Variable(dimensions, dtype, offset, size, kind == _COMPRESSED)
            file.seek(offset + size)
    return found


def values(path: Path, variable: Variable, count: int) -> Iterator[npt.NDArray[Any]]:
    """Yield a variable's numbers in file order, `count` at a time; DataError if there are too few."""
    left = math.prod(variable.dimensions)
    with path.open("rb") as file:
        order = _byte_order(file, path)
        file.seek(variable.offset)
        element = _Element(file, variable.size, path, compressed=variable.compressed)
        _header(element, order)
        while left > 0:
            step = min(count, left)
            yield np.frombuffer(element.read(step * variable.dtype.itemsize), variable.dtype)
            left -= step


def _damaged(path: Path) -> DataError:
    return DataError(f"{path}: truncated or damaged MATLAB file; fetch the original file again")


def _byte_order(file: IO[bytes], path: Path) -> str:
    """Read a file's header and return its byte order as a struct prefix."""
    head = file.read(128)
    if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
        remedy = "save it with `save(…, '-v7')` or fetch the original SVHN file"
        raise DataError(f"{path}: a MATLAB v7.3 (HDF5) file; {remedy}")
    if len(head) != 128 or head[126:128] not in {b"IM", b"MI"}:
        raise DataError(f"{path}: not a MATLAB v5 file; fetch the original SVHN file (train_32x32.mat)")
    return "<" if head[126:128] == b"IM" else ">"


class _Element:
    """The bytes of one element of a file, inflated if compressed."""

    def __init__(self, file: IO[bytes], size: int, path: Path, *, compressed: bool) -> None:
        self.path = path
        self.compressed = compressed
        self._file, self._left = file, size
        self._inflater = zlib.decompressobj()

    def _stored(self, count: int) -> bytes:
        data = self._file.read(min(count, self._left))
        self._left -= len(data)
        return data

    def read(self, count: int) -> bytes:
        """Return exactly the next `count` bytes; DataError if there are fewer."""
        if not self.compressed:
            data = self._stored(count)
        else:
            inflated = bytearray()
            while len(inflated) < count:
                stored = self._inflater.unconsumed_tail or self._stored(_STORED_BYTES)
                try:
                    piece = self._inflater.decompress(stored, count - len(inflated))
                except zlib.error as error:
                    raise _damaged(self.path) from error
                if not stored and not piece:
                    break
                inflated += piece
            data = bytes(inflated)
        if len(data) != count:
            raise _damaged(self.path)
        return data


def _part(element: _Element, order: str, most: int) -> bytes:
    """Read one small sub-element and return its data without the padding to 8 bytes."""
    tag = element.read(8)
    kind, size = struct.unpack(order + "II", tag)
    if kind >> 16:  # the packed form: up to four bytes of data inside the tag
        return tag[4 : 4 + (kind >> 16)]
    if size > most:
        raise _damaged(element.path)
    return element.read(size + -size % 8)[:size]


def _header(element: _Element, order: str) -> tuple[str, tuple[int, ...], np.dtype[Any]] | None:
    """Read up to the first number; return name, shape and type, or None if not a plain numeric array."""
    if element.compressed:
        kind, _ = struct.unpack(order + "II", element.read(8))
        if kind != _MATRIX:
            return None
    flags = _part(element, order, 8)
    if len(flags) != 8 or struct.unpack(order + "II", flags)[0] & 0xFF not in _NUMERIC_CLASSES:
        return None
    dimension_bytes = _part(element, order, 64)
    if len(dimension_bytes) % 4:
        raise _damaged(element.path)
    dimensions = struct.unpack(f"{order}{len(dimension_bytes) // 4}i", dimension_bytes)
    name = _part(element, order, 256).decode("ascii", "replace")
    kind, size = struct.unpack(order + "II", element.read(8))
    if kind >> 16:  # packed: at most four bytes of numbers, too small for an image set
        return None
    if kind not in _TYPES or min(dimensions, default=-1) < 0:
        raise _damaged(element.path)
    dtype = np.dtype(order + _TYPES[kind])
    if math.prod(dimensions) * dtype.itemsize != size:
        raise _damaged(element.path)
    return name, dimensions, dtype
