"""The run's storage as a pyarrow filesystem, for the few files that Ray Train writes itself.

Ray writes a marker and a snapshot of its list of checkpoints, and asks whether checkpoints exist. With
pyarrow's own S3 filesystem, one failed write of that snapshot ends the run, an error in mid-write commits
half a file (arrow#40502), and the endpoint is configured differently from boto3's. The `Store` gives one
client, one way to find credentials on each node (only the URI is pickled), and retries during an outage.
"""

import io
import logging
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

from jebm.store.manifest import step_and_attempt
from jebm.store.storage import EndpointError, ObjectMissingError, Store, open_store

__all__ = ["StoreFileSystem", "ray_filesystem"]

_LOG = logging.getLogger("jebm.on_ray")
_PATIENCE_SECONDS = 600.0
T = TypeVar("T")


def ray_filesystem(uri: str) -> PyFileSystem:
    """Return the filesystem of the storage at `uri`; its paths are keys of the store."""
    return PyFileSystem(StoreFileSystem(uri))


class StoreFileSystem(FileSystemHandler):  # type: ignore[misc]
    """What Ray Train needs from a filesystem, on a `Store`; a folder exists if an object lies below it.

    Only the run's own retention (`AsyncWriter`), which honours pins and deletes the manifest first, deletes
    folders: Ray only forgets them. A checkpoint's folder is always reported to exist: Ray's controller learns
    of reports late, and would end the run if it tried to delete what the retention has already deleted.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._store: Store | None = None

    def __reduce__(self) -> tuple[type["StoreFileSystem"], tuple[str]]:
        return StoreFileSystem, (self.uri,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreFileSystem) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def _patiently(self, action: Callable[[Store], T]) -> T:
        """Do `action`, and retry for ten minutes while the endpoint does not answer."""
        if self._store is None:
            self._store = open_store(self.uri)
        given_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return action(self._store)
            except EndpointError as error:
                if time.monotonic() > given_up:
                    raise
                _LOG.warning("Ray's own files must wait: %s", error)
                time.sleep(random.uniform(1, 5))  # noqa: S311  (jitter)

    def get_type_name(self) -> str:
        """Return a name for error messages."""
        return "jebm-store"

    def normalize_path(self, path: str) -> str:
        """Return the path without slashes at its ends."""
        return path.strip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        """Return what is at each path: a file, a folder, or nothing."""
        return [self._patiently(partial(_info, path)) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """Return what is below a folder."""
        base = selector.base_dir.strip("/")

        def below(store: Store) -> list[FileInfo]:
            found: dict[str, FileInfo] = {}
            for entry in store.list(f"{base}/"):
                inner = entry.key[len(base) + 1 :]
                if "/" in inner and not selector.recursive:
                    folder = f"{base}/{inner.partition('/')[0]}"
                    found[folder] = FileInfo(folder, FileType.Directory)
                else:
                    found[entry.key] = FileInfo(entry.key, FileType.File, size=entry.size)
            return list(found.values())

        return self._patiently(below)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Do nothing: a folder appears with its first object."""

    def delete_dir(self, path: str) -> None:
        """Do nothing: the run's retention deletes checkpoints."""

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Do nothing, as `delete_dir`."""

    def delete_root_dir_contents(self) -> None:
        """Refuse: nothing may empty the storage."""
        raise NotImplementedError("deleting everything")

    def delete_file(self, path: str) -> None:
        """Delete one object."""
        self._patiently(lambda store: store.delete([path.strip("/")]))

    def move(self, src: str, dest: str) -> None:
        """Refuse: object storage has no rename."""
        raise NotImplementedError("move")

    def copy_file(self, src: str, dest: str) -> None:
        """Copy one object."""
        self._patiently(lambda store: store.put(dest.strip("/"), store.get(src.strip("/"))))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """Return the whole object to read."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Return the whole object to read; raises FileNotFoundError if there is none."""
        try:
            return pa.BufferReader(self._patiently(lambda store: store.get(path.strip("/"))))
        except ObjectMissingError as error:
            raise FileNotFoundError(str(error)) from error

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        """Return a buffer that is written as the object when closed."""
        key = path.strip("/")
        return pa.PythonFile(_Upload(lambda data: self._patiently(lambda store: store.put(key, data))), "w")

    def open_append_stream(self, path: str, metadata: object) -> pa.NativeFile:
        """Refuse: objects are written whole."""
        raise NotImplementedError("append")


class _Upload(io.BytesIO):
    """A buffer that passes its bytes to `put` at the first close."""

    def __init__(self, put: Callable[[bytes], object]) -> None:
        super().__init__()
        self._put = put

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._put(data)


def _info(path: str, store: Store) -> FileInfo:
    key = path.strip("/")
    if step_and_attempt(key.rpartition("/")[2]):
        return FileInfo(path, FileType.Directory)
    found = store.head(key)
    if found is not None:
        return FileInfo(path, FileType.File, size=found.size)
    folder = next(iter(store.list(f"{key}/")), None)
    return FileInfo(path, FileType.NotFound if folder is None else FileType.Directory)
