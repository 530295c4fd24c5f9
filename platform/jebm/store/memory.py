"""Objects in this process's memory."""

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from jebm.store.protocol import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Probe,
    Uploaded,
    crc32_of,
    folder_of,
    under,
)

__all__ = ["MemoryStore"]


@dataclass
class _Memory:
    """State shared by all stores of one name."""

    objects: dict[str, tuple[ObjectInfo, bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_memories: dict[str, _Memory] = {}


class MemoryStore:
    """Objects that live as long as this process: for tests and for runs that keep nothing."""

    def __init__(self, name: str, prefix: str) -> None:
        self._name, self._prefix = name, prefix
        self._memory = _memories.setdefault(name, _Memory())

    def __repr__(self) -> str:
        return f"MemoryStore({self.uri!r})"

    @property
    def uri(self) -> str:
        return f"memory://{self._name}/{self._prefix}".rstrip("/")

    @property
    def limits(self) -> Mapping[str, str]:
        return {}

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        return self._write(key, bytes(data), if_absent=if_absent)

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        data = b"".join(piece for part in parts for piece in part)
        return Uploaded(self._write(key, data, if_absent=False), tuple(crc32_of(part) for part in parts))

    def get(self, key: str) -> bytes:
        return self._find(key)[1]

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        info, data = self._find(key)
        if etag not in (None, info.etag):
            raise ObjectChangedError(f"{self.uri}/{key}: has been replaced by another object since")
        if offset + sum(piece.nbytes for piece in pieces) > info.size:
            raise ObjectChangedError(f"{self.uri}/{key}: ends before the range that was asked for")
        for piece in pieces:
            piece[:] = memoryview(data)[offset : offset + piece.nbytes]
            offset += piece.nbytes

    def head(self, key: str) -> ObjectInfo | None:
        found = self._memory.objects.get(under(self._prefix, key))
        return self._relative(found[0]) if found else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._memory.lock:
            items = sorted(self._memory.objects.items())
        start = folder_of(self._prefix) + prefix
        yield from (self._relative(info) for name, (info, _) in items if name.startswith(start))

    def folders(self) -> Iterator[str]:
        yield from sorted({info.key.partition("/")[0] for info in self.list() if "/" in info.key})

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._memory.lock:
                self._memory.objects.pop(under(self._prefix, key), None)

    def child(self, prefix: str) -> "MemoryStore":
        return MemoryStore(self._name, under(self._prefix, prefix.strip("/")))

    def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "MemoryStore":
        return self  # nothing here ever fails

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        return ()

    def probe(self, *, write: bool = True) -> Probe:
        return Probe(writable=write, conditional_writes=write)

    def _write(self, key: str, data: bytes, *, if_absent: bool) -> ObjectInfo:
        name = under(self._prefix, key)
        info = ObjectInfo(name, len(data), f"{zlib.crc32(data):08x}-{len(data):x}", datetime.now(UTC))
        with self._memory.lock:
            if if_absent and name in self._memory.objects:
                raise ObjectExistsError(f"{self.uri}/{key}: exists already")
            self._memory.objects[name] = (info, data)
        return self._relative(info)

    def _find(self, key: str) -> tuple[ObjectInfo, bytes]:
        try:
            return self._memory.objects[under(self._prefix, key)]
        except KeyError:
            raise ObjectMissingError(f"{self.uri}/{key}: no such object") from None

    def _relative(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, key=info.key[len(folder_of(self._prefix)) :])
