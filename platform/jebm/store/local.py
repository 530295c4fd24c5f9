"""Objects in a local folder, or in one that several machines share."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jebm.errors import StoreError
from jebm.store.protocol import (
    PARTIAL,
    AccessDeniedError,
    BucketMissingError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Probe,
    Uploaded,
    checked_key,
    crc32_of,
    one_line,
    probe_writes,
)

__all__ = ["LocalStore"]

_MOST_ATTEMPTS = 100  # to create a folder that another process keeps deleting


class LocalStore:
    """A folder, created by the first write. Files appear by a rename or a hard link."""

    def __init__(self, root: Path) -> None:
        try:
            self._root = root.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, circular links
            raise StoreError(f"{root}: cannot be a folder: {one_line(error)}") from error

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._root.as_uri()

    @property
    def limits(self) -> Mapping[str, str]:
        return {}

    @property
    def folder(self) -> Path:
        """The folder itself, for files that must be appended to in place."""
        return self._root

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        return self._write(key, [[memoryview(data).cast("B")]], if_absent=if_absent).info

    def upload(self, key: str, parts: Sequence[Sequence[memoryview]]) -> Uploaded:
        return self._write(key, parts, if_absent=False)

    def get(self, key: str) -> bytes:
        with self._errors("read", key):
            return self._path(key).read_bytes()

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        with self._errors("read", key), self._path(key).open("rb", buffering=0) as file:
            if etag not in (None, _etag(os.fstat(file.fileno()))):
                raise ObjectChangedError(f"{self.uri}/{key}: has been replaced by another object since")
            file.seek(offset)
            for piece in pieces:
                filled = 0
                while filled < piece.nbytes:
                    count = file.readinto(piece[filled:])
                    if not count:
                        raise ObjectChangedError(
                            f"{self.uri}/{key}: ends before the range that was asked for"
                        )
                    filled += count

    def head(self, key: str) -> ObjectInfo | None:
        with self._errors("read", key):
            path = self._path(key)
            return _local_info(key, path.stat()) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from sorted(self._walk(prefix), key=lambda info: info.key)

    def folders(self) -> Iterator[str]:
        names: list[str] = []
        with (
            self._errors("list", ""),
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self._root) as entries,
        ):
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        yield from filter(self._holds_something, names)

    def _holds_something(self, folder: str) -> bool:
        """Return whether there are objects in a folder; one that cannot be listed counts as if there were."""
        try:
            return next(self._walk(f"{folder}/"), None) is not None
        except StoreError:
            return True

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._errors("delete", key):
                path = self._path(key)
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # folders exist only while they hold something
                    for parent in path.parents:
                        if parent == self._root:
                            break
                        parent.rmdir()

    def child(self, prefix: str) -> "LocalStore":
        return LocalStore(self._path(prefix.strip("/")))

    def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "LocalStore":
        return self  # no failure here is transient

    def discard_unfinished(self, older_than_seconds: float) -> Sequence[str]:
        border = time.time() - older_than_seconds
        discarded = []
        for folder, names in self._folders(self._root):
            for path in (Path(folder, name) for name in names if name.startswith(PARTIAL)):
                with self._errors("delete", ""), contextlib.suppress(FileNotFoundError):  # finished meanwhile
                    if path.stat().st_mtime < border:
                        path.unlink()
                        discarded.append(path.relative_to(self._root).as_posix())
        return discarded

    def probe(self, *, write: bool = True) -> Probe:
        if write:
            with self._errors("write", ""):
                missing = [folder for folder in (self._root, *self._root.parents) if not folder.exists()]
            try:
                return probe_writes(self)
            finally:  # whoever only asks leaves nothing behind
                for folder in missing:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
        with self._errors("list", ""):
            if self._root.is_file():
                raise StoreError(f"{self.uri}: is a file; give the folder that holds it, or another one")
            if not self._root.is_dir():
                raise BucketMissingError(f"{self.uri}: no such folder")
            with os.scandir(self._root) as entries:
                next(entries, None)
        return Probe(writable=False, conditional_writes=False)

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._errors("list", ""):
            start = self._root / prefix.rpartition("/")[0]
            if not self._is_within(start):
                raise StoreError(f"{self.uri}: {prefix!r} lies outside")
        for folder, names in self._folders(start):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and not name.startswith(PARTIAL):
                    try:
                        with self._errors("read", key):
                            info = _local_info(key, path.stat())
                    except ObjectMissingError:  # deleted meanwhile
                        continue
                    yield info

    def _folders(self, start: Path) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield each folder with the names of its files.

        Raises StoreError for an unreadable one: skipping it would treat it as empty.
        """

        def refuse(error: OSError) -> None:
            if isinstance(error, FileNotFoundError | NotADirectoryError):  # deleted meanwhile, or a file
                return
            key = Path(error.filename).relative_to(self._root).as_posix()
            with self._errors("list", key if key != "." else ""):
                raise error

        walk = os.walk(start, onerror=refuse)
        while True:
            with self._errors("list", ""):
                found = next(walk, None)
            if found is None:
                return
            yield found[0], found[2]

    def _write(self, key: str, parts: Sequence[Sequence[memoryview]], *, if_absent: bool) -> Uploaded:
        with self._errors("write", key):
            path = self._path(key)
            # Open a partial file; a concurrent delete may remove the empty folder in between.
            for attempt in range(_MOST_ATTEMPTS):
                partial_path = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    file = partial_path.open("xb")
                    break
                except FileNotFoundError:  # the folder was empty, and a delete has just removed it
                    if attempt == _MOST_ATTEMPTS - 1:
                        raise
            try:
                with file:
                    for part in parts:
                        for piece in part:
                            file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                    info = _local_info(key, os.fstat(file.fileno()))
                # The object appears now, complete and flushed.
                if if_absent:
                    self._link(key, partial_path, path)
                else:
                    partial_path.replace(path)
            finally:
                with contextlib.suppress(OSError):  # the earlier error matters more
                    partial_path.unlink(missing_ok=True)
            _sync_folder(path.parent)
        return Uploaded(info, tuple(crc32_of(part) for part in parts))

    def _link(self, key: str, partial_path: Path, path: Path) -> None:
        """Give a file its name unless that is taken: unlike a rename, a link never replaces."""
        try:
            os.link(partial_path, path)
        except FileExistsError:
            raise ObjectExistsError(f"{self.uri}/{key}: exists already") from None

    def _path(self, key: str) -> Path:
        path = self._root / checked_key(key)
        if not self._is_within(path):
            raise StoreError(f"{self.uri}/{key}: leads out of the store by a symbolic link")
        return path

    def _is_within(self, path: Path) -> bool:
        """Return whether a path, with its links followed, is in the store; raises StoreError for a loop."""
        try:
            return path.resolve().is_relative_to(self._root)
        except RuntimeError as error:  # before Python 3.13
            raise StoreError(f"{path}: cannot be read: {one_line(error)}; remove that link") from error

    @contextlib.contextmanager
    def _errors(self, what: str, key: str) -> Iterator[None]:
        place = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except PermissionError as error:
            raise AccessDeniedError(
                f"{place}: this user may not {what} here ({error.strerror}); choose another folder, or grant "
                "the right"
            ) from error
        except (OSError, ValueError) as error:
            absent = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
            if what == "read" and absent:
                raise ObjectMissingError(f"{place}: no such object") from error
            if what == "write":
                raise StoreError(
                    f"{place}: cannot be written: {_reason(error)}; choose another folder"
                ) from error
            raise StoreError(f"{place}: cannot {what}: {_reason(error)}") from error


def _reason(error: OSError | ValueError) -> str:
    """Return the system's message, with the file it concerns."""
    if not isinstance(error, OSError) or error.strerror is None:
        return one_line(error)
    if isinstance(error, FileExistsError):
        return f"{error.filename} is no folder"
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _local_info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, _etag(found), datetime.fromtimestamp(found.st_mtime, UTC))


def _sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
