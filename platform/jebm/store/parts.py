"""The one verified reader of headers and parts, for all callers.

`verify` names whatever `load` refuses, since both read through here. Every byte that is kept was checked
against the CRC32 of its part. A part or header that does not match is read once more, since the bit may have
flipped in transit.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import TypeAlias

from torch import Tensor

from jebm.errors import CheckpointError
from jebm.store.finite import FiniteScan, not_finite_line
from jebm.store.layout import HEADER_BYTES, StoredObject, TensorEntry, parsed_header
from jebm.store.protocol import (
    ObjectChangedError,
    ObjectMissingError,
    Store,
    crc32_of,
    in_parallel,
)

__all__ = ["Count", "Parts", "Receive", "damages", "fitting_headers", "read_headers"]

Receive: TypeAlias = Callable[[int, memoryview], None]
"""Called with an offset in the object and the bytes there; a second try restarts at the part's start."""

Count: TypeAlias = Callable[[int], None]
"""Called with the bytes done since the last call; negative if they will be read again."""

_TRIES = 2  # of a part or header that does not match its CRC32
_FIRST_READ_BYTES = 64 << 10  # holds a typical model's header
_SLICE_BYTES = 4 << 20  # per thread, while streaming a part
_SHOWN = 3  # differences named in an error


def ignore(_done: int) -> None:
    """Count nothing."""


class Parts:
    """The parts of an object in its present state, each checked against its CRC32 when read."""

    def __init__(self, store: Store, stored: StoredObject) -> None:
        """Look up the object; raises CheckpointError if it is gone or has another size."""
        info = store.head(stored.key)
        if info is None:
            raise CheckpointError(f"{store.uri}/{stored.key}: the object is gone")
        self._store, self._stored = store, stored
        self.etag = info.etag
        """The present one: in a copy it differs from the manifest's."""
        if info.size != stored.size:
            raise self._damaged(f"{info.size} bytes instead of {stored.size}")

    def fill(self, number: int, pieces: Sequence[memoryview]) -> None:
        """Read one part into pieces of the same total size; raises CheckpointError for damage."""

        def once() -> int:
            begin = number * self._stored.part_size
            self._store.read_into(self._stored.key, begin, pieces, etag=self.etag)
            return crc32_of(pieces)

        self._check(number, once)

    def stream(self, number: int, receive: Receive, count: Count = ignore) -> None:
        """Read one part slice by slice; raises CheckpointError for damage, after slices were received."""
        begin = number * self._stored.part_size
        end = min(begin + self._stored.part_size, self._stored.size)
        buffer = memoryview(bytearray(min(_SLICE_BYTES, end - begin)))
        done = 0

        def once() -> int:
            nonlocal done
            count(-done)
            done = value = 0
            for offset in range(begin, end, _SLICE_BYTES):
                piece = buffer[: min(_SLICE_BYTES, end - offset)]
                self._store.read_into(self._stored.key, offset, [piece], etag=self.etag)
                value = zlib.crc32(piece, value)
                receive(offset, piece)
                count(piece.nbytes)
                done += piece.nbytes
            return value

        self._check(number, once)

    def _check(self, number: int, once: Callable[[], int]) -> None:
        if not any(once() == self._stored.crc32[number] for _ in range(_TRIES)):
            raise self._damaged(f"part {number + 1} of {len(self._stored.crc32)} does not match its CRC32")

    def _damaged(self, reason: str) -> CheckpointError:
        return _damaged(self._store, self._stored, reason)


def read_headers(store: Store, objects: Sequence[StoredObject]) -> list[dict[str, TensorEntry]]:
    """Return each object's tensors by name, in byte order.

    Raises CheckpointError if a header is not exactly what `upload_tensors` writes, if two objects hold a
    tensor of one name, or if all headers together exceed the limit for one.
    """
    room = _Room(HEADER_BYTES)

    def read(_index: int, stored: StoredObject) -> dict[str, TensorEntry]:
        encoded = _header(store, stored, room)
        try:
            return parsed_header(encoded, stored.size)
        except ValueError as error:
            raise _damaged(store, stored, str(error)) from error

    headers = in_parallel(read, objects)
    seen: set[str] = set()
    for stored, entries in zip(objects, headers, strict=True):
        if twice := seen & entries.keys():
            raise CheckpointError(f"{stored.key}: {min(twice)[:80]!r} is in another object, too")
        seen.update(entries)
    return headers


def fitting_headers(
    store: Store, objects: Sequence[StoredObject], tensors: Mapping[str, Tensor]
) -> list[dict[str, TensorEntry]]:
    """Return each object's tensors, as `read_headers`, if together they match these.

    Otherwise CheckpointError lists the first differences. Only names, shapes and dtypes of `tensors` matter.
    """
    headers = read_headers(store, objects)
    entries = {name: entry for header in headers for name, entry in header.items()}
    _compare(store.uri, entries, tensors)
    return headers


def damages(store: Store, objects: Sequence[StoredObject], count: Count = ignore) -> list[str]:
    """Read all of a checkpoint's objects and return a line for each reason why `load` would refuse it.

    Reasons are an object that is gone or has another size, and a part with another CRC32; if there are none
    of these, a malformed header, or tensors that hold NaN or infinity.
    """
    headers: Sequence[Mapping[str, TensorEntry]] = [{} for _ in objects]
    unfit: list[str] = []
    try:
        headers = read_headers(store, objects)
    except (CheckpointError, ObjectChangedError, ObjectMissingError) as error:
        unfit.append(str(error))
    found: list[str] = []
    odd: list[str] = []
    for stored, entries in zip(objects, headers, strict=True):
        scan = FiniteScan(entries)
        try:
            found += _damaged_parts(Parts(store, stored), stored, scan, count)
        except CheckpointError as error:
            found.append(str(error))
        odd += scan.names()
    if odd:
        unfit.append(not_finite_line(odd))
    return found or unfit


def _damaged_parts(parts: Parts, stored: StoredObject, scan: FiniteScan, count: Count) -> list[str]:
    """Stream all parts through the scan; return a line for each damaged one."""

    def check(number: int, _begin: int) -> str | None:
        try:
            parts.stream(number, scan.receive, count)
        except CheckpointError as error:
            return str(error)
        return None

    lines = in_parallel(check, range(0, stored.size, stored.part_size))
    return [line for line in lines if line is not None]


class _Room:
    """The byte budget shared by all headers."""

    def __init__(self, size: int) -> None:
        self._left, self._lock = size, Lock()

    def take(self, size: int) -> bool:
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True


def _header(store: Store, stored: StoredObject, room: _Room) -> bytes:
    """Return an object's checked header, without its length; raises CheckpointError."""
    length = 0
    for _ in range(_TRIES):
        start = _beginning(store, stored, min(_FIRST_READ_BYTES, stored.size))
        length = int.from_bytes(start[:8], "little")
        if stored.size < 8 or not 2 <= length <= stored.size - 8 or length > HEADER_BYTES:
            continue
        if not room.take(length):
            break
        if len(start) < 8 + length:
            start = _beginning(store, stored, 8 + length)
        header = start[: 8 + length]
        if stored.header_crc32 in (None, zlib.crc32(header)):
            return bytes(header[8:])
        room.take(-length)
    else:
        if 2 <= length <= min(stored.size - 8, HEADER_BYTES):
            raise _damaged(store, stored, "its header does not match its CRC32")
    raise _damaged(store, stored, f"a header of {length} bytes in an object of {stored.size}")


def _beginning(store: Store, stored: StoredObject, size: int) -> bytearray:
    """Return the first bytes; if the header has no CRC32, check them through the parts that hold them."""
    start = bytearray(size)
    if stored.header_crc32 is not None:
        store.read_into(stored.key, 0, [memoryview(start)])
        return start

    def keep(offset: int, piece: memoryview) -> None:
        wanted = piece[: max(size - offset, 0)]
        start[offset : offset + wanted.nbytes] = wanted

    parts = Parts(store, stored)
    for number in range(-(-size // stored.part_size)):
        parts.stream(number, keep)
    return start


def _damaged(store: Store, stored: StoredObject, reason: str) -> CheckpointError:
    return CheckpointError(f"{store.uri}/{stored.key} is damaged: {reason}")


def _compare(place: str, entries: Mapping[str, TensorEntry], into: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError listing the first differences between stored and receiving tensors."""
    differences = [f"{name} is missing in the checkpoint" for name in into if name not in entries]
    differences += [f"{name} is only in the checkpoint" for name in entries if name not in into]
    for name, entry in entries.items():
        if name in into:
            tensor = into[name]
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                differences.append(
                    f"{name} is {entry.dtype}{list(entry.shape)} in the checkpoint "
                    f"and {tensor.dtype}{list(tensor.shape)} in the model"
                )
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(f"{place} does not fit: {'; '.join(differences[:_SHOWN])}{more}")
