"""What a store of objects does, whatever it keeps them in: protocol, errors, what all keepers share."""

import contextlib
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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
"""Parts of one object that travel at a time; each has one socket buffer's worth of extra memory."""

PARTIAL = ".partial-"
"""How names of local files begin that are on their way; no segment of a key does."""

_KEY_BYTES = 1024  # the longest key of S3

_Item = TypeVar("_Item")
_T = TypeVar("_T")


class ObjectMissingError(StoreError):
    """There is no object under this key."""


class ObjectExistsError(StoreError):
    """A conditional write found an object under its key."""


class ObjectChangedError(StoreError):
    """The object is no longer the one that the caller has seen, or shorter than the range asked for."""


class AccessDeniedError(StoreError):
    """The credentials are missing, wrong or expired, or do not allow the operation."""


class BucketMissingError(StoreError):
    """The bucket, or the local folder to read from, does not exist."""


class EndpointError(StoreError):
    """Nobody answers at the endpoint, or the connection broke for longer than we retry."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of an object: size in bytes; an etag that changes when the content does."""

    key: str
    size: int
    etag: str
    modified: datetime


@dataclass(frozen=True)
class Uploaded:
    """An object sent in parts: what the store knows of it, and the CRC32 of each part as it was sent."""

    info: ObjectInfo
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """What a store allows; without conditional writes two writers are not kept apart."""

    writable: bool
    conditional_writes: bool


class Store(Protocol):
    """Whole objects by key. Safe to share between threads; every method raises StoreError in one line."""

    @property
    def uri(self) -> str:
        """The place, without a trailing slash and without secrets."""

    @property
    def limits(self) -> Mapping[str, str]:
        """What this place was found to lack so far: each ability, with why we think so and what is done."""

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        """Write an object; with `if_absent` raise ObjectExistsError where the key is taken."""

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        """Write an object from parts, each a sequence of byte views; on failure no object appears.

        All parts but the last have one size, at least 5 MiB (the rule of S3); at most 10,000 parts.
        """

    def get(self, key: str) -> bytes:
        """Return the whole object; raise ObjectMissingError where there is none."""

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        """Fill the pieces, one after the other, with the bytes from `offset` on.

        Raises ObjectChangedError where the etag is another one, or the object ends too early.
        """

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of an object, None where there is none."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object whose key begins with `prefix`; sort them where the order matters."""

    def folders(self) -> Iterator[str]:
        """Yield the names right below this store's URI that have objects below them.

        Some servers go on naming a folder for a while after its last object is deleted.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; a key without one is fine."""

    def child(self, prefix: str) -> "Store":
        """Return the store of the folder `prefix`."""

    def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "Store":
        """Return this store with another patience: how long a request that fails is tried again.

        `on_retry()` is called each time that one is, in the thread that waits for it.
        """

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        """Give up uploads that began longer ago and never ended; return their keys.

        No listing shows them, yet their bytes are stored and paid for.
        """

    def probe(self, *, write: bool = True) -> Probe:
        """Check that the place can be reached, exists, and can be read and (with `write`) written.

        Leaves nothing behind. Warns in the log of what the place lacks (`limits`).
        """


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Within it, an OSError becomes a StoreError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error.strerror or error}") from error


def in_parallel(work: Callable[[int, _Item], _T], items: Sequence[_Item]) -> list[_T]:
    """Return `work(index, item)` of every item, in order; PART_THREADS at a time.

    The first failure is raised, once those that had begun have ended; no other one begins.
    """
    with ThreadPoolExecutor(PART_THREADS, thread_name_prefix="jebm-part") as pool:
        futures = [pool.submit(work, index, item) for index, item in enumerate(items)]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def checked_key(key: str) -> str:
    """Return the key if it stays below its store and means the same everywhere; else raise StoreError."""
    segments = key.split("/")
    if (
        any(segment in ("", ".", "..") or segment.startswith(PARTIAL) for segment in segments)
        or any(ord(letter) < 32 or letter in "\\\x7f" for letter in key)
        or len(key.encode("utf-8", "surrogatepass")) > _KEY_BYTES
    ):
        raise StoreError(f"{key[:200]!r} is not a key: no empty, '.' or '..' segment, no control character")
    return key


def under(prefix: str, key: str) -> str:
    """Return the key below a prefix; raises StoreError as `checked_key`."""
    return f"{prefix}/{checked_key(key)}" if prefix else checked_key(key)


def folder_of(prefix: str) -> str:
    """Return a prefix that ends at a folder's border."""
    return f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""


def one_line(text: object) -> str:
    """Return what a message says without its line breaks."""
    return " ".join(str(text).split())


def crc32_of(pieces: Sequence[memoryview]) -> int:
    """Return the CRC32 of bytes that lie in pieces."""
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


def probe_writes(store: Store) -> Probe:
    """Write, write again on condition that nothing is there, and clean up.

    Raises StoreError: the first one, whatever becomes of the cleaning up after it.
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
