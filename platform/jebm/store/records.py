"""Small records that jobs keep in a store: read strictly, up to a size limit; set aside if damaged.

A record is worth less than the work it describes. So a job that finds its record damaged renames it, reports
that in one line, and begins a fresh one.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator

from jebm.errors import StoreError
from jebm.store.local import LocalStore
from jebm.store.protocol import AccessDeniedError, ObjectInfo, ObjectMissingError, Store, one_line
from jebm.untrusted import JsonObject, parsed_object, typed

__all__ = [
    "RECORD_BYTES",
    "DamagedRecordError",
    "listed_objects",
    "read_bytes",
    "read_object",
    "read_pieces",
    "set_aside",
    "understood",
]

RECORD_BYTES = 16 * 2**20
"""The largest record that is read."""

_COPIED_BYTES = 64 * 2**20  # at a time, when a record is set aside


class DamagedRecordError(StoreError):
    """A record cannot be read; the message names it and says why, without a remedy."""


@contextlib.contextmanager
def understood(store: Store, key: str) -> Iterator[None]:
    """Turn a ValueError raised within into a `DamagedRecordError` about the record `key`."""
    try:
        yield
    except ValueError as error:
        raise DamagedRecordError(f"{store.uri}/{key}: is damaged ({one_line(error)[:300]})") from error


def read_bytes(store: Store, key: str, most_bytes: int) -> bytes:
    """Return a whole object of at most `most_bytes`.

    Raises:
        ObjectMissingError: there is none.
        DamagedRecordError: it is longer; or, in a local folder, it is not a file or cannot be read.
        StoreError: the store refuses or cannot be reached.
    """
    with _readable(store, key):
        _sized(store, key, most_bytes)
        return store.get(key)


def read_pieces(store: Store, key: str, most_bytes: int, piece_bytes: int = 8 * 2**20) -> Iterator[bytes]:
    """Yield an object of at most `most_bytes` piece by piece; raises as `read_bytes`."""
    with _readable(store, key):
        info = _sized(store, key, most_bytes)
        for offset in range(0, info.size, piece_bytes):
            piece = bytearray(min(piece_bytes, info.size - offset))
            store.read_into(key, offset, [memoryview(piece)], etag=info.etag)
            yield bytes(piece)


def read_object(store: Store, key: str) -> JsonObject:
    """Return the JSON object under a key; raises as `read_bytes`, also if it is not strict JSON."""
    encoded = read_bytes(store, key, RECORD_BYTES)
    with understood(store, key):
        return parsed_object(encoded, RECORD_BYTES)


def listed_objects(record: JsonObject, name: str) -> list[JsonObject]:
    """Return a record's field `name`; raises ValueError if it is not a list of JSON objects."""
    items = typed(record, name, list)
    if not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{name} holds more than objects")
    return items


def set_aside(store: Store, key: str) -> str:
    """Rename a damaged record to `<key>.damaged-<n>` and return that name.

    In an object store it is copied and deleted; a very long one is split into `<name>.part-<n>`.

    Raises:
        StoreError: the record could not be renamed and is still there.
    """
    if isinstance(store, LocalStore):
        return _renamed(store, key)
    taken = {info.key.partition(".part-")[0] for info in store.list(f"{key}.damaged-")}
    name = next(name for n in itertools.count(1) if (name := f"{key}.damaged-{n}") not in taken)
    _copy(store, key, name)
    with contextlib.suppress(AccessDeniedError):  # a fresh record will replace it
        store.delete([key])
    return name


@contextlib.contextmanager
def _readable(store: Store, key: str) -> Iterator[None]:
    """Treat whatever makes a local file unreadable, such as its permissions, as damage to the record."""
    with understood(store, key):
        if isinstance(store, LocalStore):
            path = store.folder / key
            if os.path.lexists(path) and not path.is_file():
                raise ValueError("it is not a file")
        try:
            yield
        except ObjectMissingError:
            raise
        except StoreError as error:
            if not isinstance(store, LocalStore):
                raise
            raise ValueError(str(error)) from error


def _sized(store: Store, key: str, most_bytes: int) -> ObjectInfo:
    info = store.head(key)
    if info is None:
        raise ObjectMissingError(f"{store.uri}/{key}: no such object")
    if info.size > most_bytes:
        raise ValueError(f"it has {info.size:,} bytes; at most {most_bytes:,} are read")
    return info


def _renamed(store: LocalStore, key: str) -> str:
    path = store.folder / key
    names = (f"{path.name}.damaged-{n}" for n in itertools.count(1))
    name = next(name for name in names if not os.path.lexists(path.with_name(name)))
    try:
        path.rename(path.with_name(name))
    except OSError as error:
        raise StoreError(
            f"{store.uri}/{key}: is damaged, and cannot be renamed: {error.strerror or one_line(error)}"
        ) from error
    return f"{key.removesuffix(path.name)}{name}"


def _copy(store: Store, key: str, name: str) -> None:
    """Copy an object using bounded memory."""
    info = store.head(key)
    if info is None:
        return
    if info.size <= _COPIED_BYTES:
        store.put(name, store.get(key))
        return
    for number, piece in enumerate(read_pieces(store, key, info.size, _COPIED_BYTES), start=1):
        store.put(f"{name}.part-{number:04d}", piece)
