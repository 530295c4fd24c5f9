"""Local files that are written in place, from several threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jebm.errors import StoreError

__all__ = ["os_errors", "write_at"]


def write_at(descriptor: int, base: int, offset: int, piece: memoryview) -> None:
    """Write all of a piece at `base + offset`; raises OSError."""
    while piece.nbytes:
        count = os.pwrite(descriptor, piece, base + offset)
        piece, offset = piece[count:], offset + count


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Within it, an OSError becomes a StoreError that names the path."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}") from error
