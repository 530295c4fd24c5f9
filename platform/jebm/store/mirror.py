"""Download a checkpoint to a local folder that then is a store of its own."""

import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jebm.errors import CheckpointError, StoreError
from jebm.store.judge import MANIFEST, read_manifest
from jebm.store.layout import StoredObject
from jebm.store.manifest import Manifest
from jebm.store.parts import Parts
from jebm.store.protocol import ObjectExistsError, Store, in_parallel, os_errors
from jebm.store.retrieve import Progress, RunStore, counter, size_of
from jebm.store.storage import open_store

__all__ = ["Download", "download"]

_SLICE_BYTES = 4 << 20  # per thread, of four


@dataclass(frozen=True)
class Download:
    """A checkpoint in a local folder: bytes fetched, and bytes already there and intact."""

    folder: Path
    bytes_fetched: int
    bytes_kept: int


def download(run: RunStore, manifest: Manifest, target: Path, progress: Progress) -> Download:
    """Download a checkpoint to `<target>/<run>/checkpoints/<name>`, where `open_store(target)` finds it.

    Intact parts already there are kept, so an interrupted download resumes and a damaged one is repaired. The
    manifest comes last: until then the folder does not count as a checkpoint. Raises CheckpointError if a
    part is damaged in the store, StoreError if either side cannot be reached.
    """
    encoded, found = read_manifest(run.root.child(f"{run.name}/checkpoints"), manifest.name)
    if found != manifest:
        raise CheckpointError(f"{run.uri}: {manifest.name} has been replaced by another checkpoint since")
    source = run.folder(manifest.name)
    # Refuse a folder that holds another checkpoint.
    store = open_store(str(target)).child(f"{run.name}/checkpoints/{manifest.name}")
    if store.head(MANIFEST) is not None and store.get(MANIFEST) != encoded:
        raise _taken(target, manifest)
    folder = target.expanduser().absolute() / run.name / "checkpoints" / manifest.name
    with os_errors(f"{folder}: cannot write"):
        _check_room(folder, manifest)
    # Data first, the manifest last.
    count = counter(progress, size_of(manifest))
    fetched = 0
    for stored in manifest.objects:
        with os_errors(f"{folder / stored.key}: cannot write"):
            fetched += _fetch_object(source, stored, folder / stored.key, count)
    try:
        store.put(MANIFEST, encoded, if_absent=True)
    except ObjectExistsError as error:
        if store.get(MANIFEST) != encoded:
            raise _taken(target, manifest) from error
    return Download(folder, fetched, size_of(manifest) - fetched)


def _check_room(folder: Path, manifest: Manifest) -> None:
    """Raise StoreError if the disk has no room for the rest of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder).free
    for stored in manifest.objects:
        with suppress(FileNotFoundError):
            room += (folder / stored.key).stat().st_blocks * 512
    if size_of(manifest) > room:
        raise StoreError(f"{folder}: {size_of(manifest):,} bytes do not fit into the {room:,} free ones")


def _fetch_object(source: Store, stored: StoredObject, path: Path, count: Callable[[int], None]) -> int:
    """Make `path` hold the object and return how many bytes were fetched."""
    parts = Parts(source, stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        found = os.fstat(descriptor)
        os.truncate(descriptor, stored.size)  # missing bytes read as zeros and fail their CRC32

        def fetch(number: int, begin: int) -> int:
            size = min(stored.part_size, stored.size - begin)
            if begin < found.st_size and _local_crc32(descriptor, begin, size) == stored.crc32[number]:
                count(size)
                return 0
            parts.stream(number, partial(_write_at, descriptor), count)
            return size

        # Fetch only the parts whose bytes on disk are missing or wrong.
        fetched = in_parallel(fetch, range(0, stored.size, stored.part_size))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the file's name must survive a power cut, like the manifest's
    finally:
        os.close(folder)
    return sum(fetched)


def _write_at(descriptor: int, offset: int, piece: memoryview) -> None:
    """Write all of a piece; raises OSError."""
    while piece.nbytes:
        count = os.pwrite(descriptor, piece, offset)
        piece, offset = piece[count:], offset + count


def _local_crc32(descriptor: int, begin: int, size: int) -> int:
    buffer = memoryview(bytearray(min(_SLICE_BYTES, size)))
    value = 0
    for offset in range(begin, begin + size, _SLICE_BYTES):
        count = os.preadv(descriptor, [buffer[: min(_SLICE_BYTES, begin + size - offset)]], offset)
        value = zlib.crc32(buffer[:count], value)
    return value


def _taken(target: Path, manifest: Manifest) -> StoreError:
    return StoreError(f"{target}: holds another checkpoint called {manifest.name}; give another folder")
