"""Request bodies read from separate views without joining them."""

import base64
import io
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["base64_of", "body_of", "rest_of"]

_BODY_BYTES = 1 << 16  # copied at a time from the caller's memory


class _Pieces(io.RawIOBase):
    """Separate views read as one file, so that botocore sends them without joining them."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = pieces
        self._size = sum(piece.nbytes for piece in pieces)
        self._rewind()

    def _rewind(self) -> None:
        self._index, self._within, self._position = 0, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        target = min(max(start + offset, 0), self._size)
        self._rewind()
        while self._position < target:
            step = min(target - self._position, self._pieces[self._index].nbytes)
            self._position += step
            if step < self._pieces[self._index].nbytes:
                self._within = step
            else:
                self._index += 1
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        into = memoryview(buffer).cast("B")
        filled = 0
        while filled < into.nbytes and self._index < len(self._pieces):
            piece = self._pieces[self._index][self._within : self._within + into.nbytes - filled]
            into[filled : filled + piece.nbytes] = piece
            filled += piece.nbytes
            self._within += piece.nbytes
            if self._within == self._pieces[self._index].nbytes:
                self._index, self._within = self._index + 1, 0
        self._position += filled
        return filled


class _Body(io.BufferedReader):
    """A request body. botocore reads 1 MiB at a time to sign it; shorter reads do as well."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, _BODY_BYTES))


def body_of(pieces: Sequence[memoryview]) -> _Body:
    """Return a fresh body; its buffer keeps small reads out of Python code."""
    return _Body(_Pieces(pieces), _BODY_BYTES)


def base64_of(crc32: int) -> str:
    """Return a CRC32 in S3's base64 form."""
    return base64.b64encode(crc32.to_bytes(4, "big")).decode("ascii")


def rest_of(pieces: Sequence[memoryview], skip: int) -> Iterator[memoryview]:
    """Yield what remains of the pieces after the first `skip` bytes."""
    for piece in pieces:
        if skip < piece.nbytes:
            yield piece[skip:]
        skip = max(skip - piece.nbytes, 0)
