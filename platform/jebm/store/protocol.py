"""The protocol of object stores, its errors, and helpers that all backends share."""

import contextlib
import threading
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from jebm.errors import StoreError

__all__ = [
    "PARTIAL",
    "PART_THREADS",
    "AccessDeniedError",
    "BucketMissingError",
    "EndpointError",
    "ObjectChangedError",
    "ObjectExistsError",
    "ObjectInfo",
    "ObjectMissingError",
    "Probe",
    "Store",
    "Uploaded",
    "checked_key",
    "crc32_of",
    "folder_of",
    "in_parallel",
    "one_line",
    "os_errors",
    "probe_writes",
    "under",
]

PART_THREADS = 4
"""Parts of one object in flight at a time; each takes one socket buffer of extra memory."""

PARTIAL = ".partial-"
"""Prefix of local files that are still being written; no segment of a key begins with it."""

_KEY_BYTES = 1024  # S3's limit on a key

_Item = TypeVar("_Item")
_T = TypeVar("_T")


class ObjectMissingError(StoreError):
    """There is no object under this key."""


class ObjectExistsError(StoreError):
    """A conditional write found an object under its key."""


class ObjectChangedError(StoreError):
    """The object has changed since the caller last saw it, or is shorter than the requested range."""


class AccessDeniedError(StoreError):
    """The credentials are missing, wrong or expired, or do not allow the operation."""


class BucketMissingError(StoreError):
    """The bucket, or the local folder to read from, does not exist."""


class EndpointError(StoreError):
    """The endpoint does not answer, or the connection was down for longer than we retry."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object's metadata: size in bytes, and an etag that changes when the content does."""

    key: str
    size: int
    etag: str
    modified: datetime


@dataclass(frozen=True)
class Uploaded:
    """An object uploaded in parts: its metadata, and the CRC32 of each part as sent."""

    info: ObjectInfo
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """What a store allows; without conditional writes it cannot keep two writers apart."""

    writable: bool
    conditional_writes: bool


class Store(Protocol):
    """Whole objects by key. Safe to share between threads; methods raise StoreError, one line each."""

    @property
    def uri(self) -> str:
        """The location, without a trailing slash and without secrets."""

    @property
    def limits(self) -> Mapping[str, str]:
        """The features found missing here so far: each with the evidence and the workaround."""

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        """Write an object; with `if_absent` raise ObjectExistsError if the key is taken."""

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        """Write an object from parts, each a sequence of byte views; on failure no object appears.

        All parts but the last have the same size, at least 5 MiB (S3's rule); at most 10,000 parts.
        """

    def get(self, key: str) -> bytes:
        """Return the whole object; raise ObjectMissingError if there is none."""

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        """Fill the pieces in order with the bytes from `offset` on.

        Raises ObjectChangedError if the etag differs or the object is too short.
        """

    def head(self, key: str) -> ObjectInfo | None:
        """Return an object's metadata, or None if there is no object."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object whose key begins with `prefix`, in no guaranteed order."""

    def folders(self) -> Iterator[str]:
        """Yield the names directly below this store's URI that have objects below them.

        Some servers still list a folder for a while after its last object is deleted.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are fine."""

    def child(self, prefix: str) -> "Store":
        """Return the store of the folder `prefix`."""

    def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "Store":
        """Return this store with a different patience: how long a failing request is retried.

        `on_retry()` is called at each retry, in the thread that waits for the request.
        """

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        """Abort unfinished uploads that began longer ago; return their keys.

        No listing shows them, yet their bytes are stored and billed.
        """

    def probe(self, *, write: bool = True) -> Probe:
        """Check that the location is reachable, exists, and is readable and (with `write`) writable.

        Leaves nothing behind. Logs a warning for each missing feature (`limits`).
        """


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Turn an OSError raised within into a StoreError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error.strerror or error}") from error


def in_parallel(work: Callable[[int, _Item], _T], items: Sequence[_Item]) -> list[_T]:
    """Return `work(index, item)` for every item, in order, running PART_THREADS at a time.

    After a failure no further call starts; the first failure is raised once the running calls have ended.
    """
    remaining, lock = enumerate(items), threading.Lock()
    results: dict[int, _T] = {}
    failures: list[BaseException] = []

    def take_turns() -> None:
        while True:
            with lock:
                turn = None if failures else next(remaining, None)
            if turn is None:
                return
            try:
                results[turn[0]] = work(*turn)
            except BaseException as error:
                failures.append(error)

    # Daemons, not a pool: where a storage is away, a process that ends would wait for the pool's threads.
    threads = [
        threading.Thread(target=take_turns, name=f"jebm-part-{i}", daemon=True)
        for i in range(min(PART_THREADS, len(items)))
    ]
    try:
        for thread in threads:
            thread.start()
        _join(threads)
    except BaseException as error:  # an interrupt: the running calls may still use what the caller cleans up
        failures.append(error)
        _join(threads)
        raise
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(items))]


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        if thread.ident is not None:  # it was started
            thread.join()


def checked_key(key: str) -> str:
    """Return the key if it stays within its store and is portable; else raise StoreError."""
    segments = key.split("/")
    if (
        any(segment in ("", ".", "..") or segment.startswith(PARTIAL) for segment in segments)
        or any(ord(letter) < 32 or letter in "\\\x7f" for letter in key)
        or len(key.encode("utf-8", "surrogatepass")) > _KEY_BYTES
    ):
        raise StoreError(f"{key[:200]!r} is not a key: no empty, '.' or '..' segment, no control character")
    return key


def under(prefix: str, key: str) -> str:
    """Return the key below a prefix; raises as `checked_key`."""
    return f"{prefix}/{checked_key(key)}" if prefix else checked_key(key)


def folder_of(prefix: str) -> str:
    """Return the prefix with one trailing slash, or an empty one as it is."""
    return f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""


def one_line(text: object) -> str:
    """Return a message on one line."""
    return " ".join(str(text).split())


def crc32_of(pieces: Sequence[memoryview]) -> int:
    """Return the CRC32 of the pieces' bytes, concatenated."""
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


def probe_writes(store: Store) -> Probe:
    """Write an object, try to write it again with `if_absent`, and delete it.

    Raises the first StoreError, even if the cleanup fails too.
    """
    key = f".probe-{uuid.uuid4().hex}"
    try:
        store.put(key, b"", if_absent=True)
        try:
            store.put(key, b"", if_absent=True)
        except ObjectExistsError:
            conditional = True
        else:
            conditional = False
    except BaseException:
        with contextlib.suppress(StoreError):
            store.delete([key])
        raise
    store.delete([key])
    return Probe(writable=True, conditional_writes=conditional)
