"""Our data sets, decoded once per node and memory-mapped by each of its processes.

Shapes: N images, H rows, W columns, C channels, F factors.
"""

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from jebm.data.manifest import DatasetManifest, Part, read_manifest
from jebm.data.part_reader import decoded
from jebm.data.turns import sole_decoder
from jebm.errors import DataError
from jebm.paths import cache_folder, expanded
from jebm.store.protocol import Store, in_parallel

__all__ = ["ImageSet", "default_cache_directory", "load_images", "shared_images"]

_SLICE_BYTES = 4 << 20  # read back at once, to be hashed


@dataclass(frozen=True)
class ImageSet:
    """A read-only data set in memory shared by all processes of a node."""

    images_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int32] | None  # −1 for an image without one
    manifest: DatasetManifest
    factors_NF: npt.NDArray[np.int32] | None = None  # indices into the categories of manifest.factors


def shared_images(images: ImageSet, others: ImageSet) -> int:
    """Return how many images of a set have exactly the pixels of an image of another set."""
    if images.images_NHWC.shape[1:] != others.images_NHWC.shape[1:]:
        return 0
    known = {_pixel_hash(image_HWC) for image_HWC in others.images_NHWC}
    return sum(_pixel_hash(image_HWC) in known for image_HWC in images.images_NHWC)


def _pixel_hash(image_HWC: npt.NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(image_HWC.tobytes(), digest_size=16).digest()


def default_cache_directory() -> Path:
    """Return the folder of decoded images: $JEBM_CACHE, or `data` in this user's `cache_folder`.

    Raises DataError, naming JEBM_CACHE, if there is no such folder.
    """
    named = os.environ.get("JEBM_CACHE")
    try:
        return expanded(named) if named else cache_folder() / "data"
    except ValueError as error:
        raise DataError(f"JEBM_CACHE: {error}") from error
    except OSError as error:
        raise DataError(f"{error}; set JEBM_CACHE to a folder that can be written") from error


def load_images(store: Store, cache_directory: Path | None = None) -> ImageSet:
    """Return a data set's images, memory-mapped from one decoded copy on this node.

    The first process decodes the parts, several at once, into `<cache>/<sha256>.images.u8` (labels and
    factors beside it), checking every hash; others wait for it, then map the same files and share their
    pages. If it dies, one of those that wait decodes. A damaged part leaves no file, and no part is inflated
    beyond the size in the manifest.

    Raises DataError if the data set is missing or damaged, or the cache has no room or cannot be written.
    """
    manifest = read_manifest(store)
    directory = default_cache_directory() if cache_directory is None else cache_directory
    files = _files(manifest, directory)
    try:
        if _missing(files):
            directory.mkdir(parents=True, exist_ok=True)
            title = f"{manifest.name} ({manifest.split})"
            # Nobody waits here in a collective, whose timeout may be shorter than the decoding.
            with sole_decoder(directory, manifest.sha256, title) as stem:
                if missing := _missing(files):
                    _decode(store, manifest, missing, stem)
        found = {
            file.what: np.memmap(file.path, file.dtype, "r", shape=file.shape)
            for file in files
            if file.path is not None
        }
        return ImageSet(found["images"], found.get("labels"), manifest, found.get("factors"))
    except OSError as error:
        need = sum(file.bytes for file in files)
        reason = f"{directory}: the image cache cannot be used ({error.strerror or error})"
        raise DataError(f"{reason}; set JEBM_CACHE to a folder with {need / 1e6:.0f} MB free") from error


@dataclass(frozen=True)
class _File:
    """One decoded file of the cache, named by the hash of its content; what has no hash has no file."""

    what: str
    sha256: str | None
    dtype: str
    shape: tuple[int, ...]
    path: Path | None

    @property
    def row_bytes(self) -> int:
        """The size of what it holds of one image."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.shape[0] * self.row_bytes


def _files(manifest: DatasetManifest, directory: Path) -> tuple[_File, _File, _File]:
    """Return the files of a data set's pixels, labels and factors."""
    images, hashes = manifest.images, (manifest.sha256, manifest.labels_sha256, manifest.factors_sha256)
    shapes = (manifest.shape, (images,), (images, len(manifest.factors)))
    kinds = (("images", "u1", "u8"), ("labels", "<i4", "i32"), ("factors", "<i4", "i32"))
    pixels, labels, factors = (
        _File(what, sha256, dtype, shape, directory / f"{sha256}.{what}.{ending}" if sha256 else None)
        for (what, dtype, ending), sha256, shape in zip(kinds, hashes, shapes, strict=True)
    )
    return pixels, labels, factors


def _missing(files: Sequence[_File]) -> list[_File]:
    """Return the files that are not there, or have another size; a file gets its name once complete."""
    return [
        file
        for file in files
        if file.path and not (file.path.is_file() and file.path.stat().st_size == file.bytes)
    ]


def _decode(store: Store, manifest: DatasetManifest, files: Sequence[_File], stem: Path) -> None:
    """Decode all parts into these files, PART_THREADS at a time; each appears complete or not at all.

    Raises:
        DataError: there is no room for them, or a part or a file has other content than the manifest says.
    """
    paths = [stem.with_suffix(f".{file.what}") for file in files]
    with contextlib.ExitStack() as stack:
        for path in paths:
            path.unlink(missing_ok=True)  # of a decoder that died
            stack.callback(path.unlink, missing_ok=True)
        _check_room(manifest, stem.parent, sum(file.bytes for file in files))
        sinks = [stack.enter_context(_Sink(file, path)) for file, path in zip(files, paths, strict=True)]
        starts = [0, *accumulate(part.images for part in manifest.parts)]
        waiting = set(range(len(manifest.parts)))
        lock, hashed = Lock(), 0

        def decode(index: int, part: Part) -> None:
            nonlocal hashed
            row = starts[index]
            for contents in decoded(store, part, manifest):
                for sink in sinks:
                    sink.write(row, contents[sink.file.what])
                row += len(contents["labels"])
            # Parts end in any order; the hashes take them in theirs, while other threads decode.
            with lock:
                waiting.remove(index)
                while hashed < len(manifest.parts) and hashed not in waiting:
                    for sink in sinks:
                        sink.hash(starts[hashed], starts[hashed + 1])
                    hashed += 1

        in_parallel(decode, manifest.parts)
        # Checked before any file gets its name.
        for file, sink in zip(files, sinks, strict=True):
            if sink.digest.hexdigest() != file.sha256:
                what = "parts" if file.what == "images" else file.what
                raise DataError(
                    f"{store.uri}: the {what} are not those of the manifest; ingest the data set again"
                )
        for sink in sinks:
            sink.finish()


def _check_room(manifest: DatasetManifest, directory: Path, need: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < need:
        raise DataError(
            f"{directory}: {manifest.name} ({manifest.split}) takes {need:,} bytes decoded, and {free:,} are "
            f"free; set JEBM_CACHE to a folder with {need / 1e6:.0f} MB free"
        )


class _Sink:
    """A file of its full size from the start: written in any order, hashed in the images' order."""

    def __init__(self, file: _File, path: Path) -> None:
        """Make the file at `path`, whose final one is `file.path`; OSError if that cannot be."""
        self.file, self.digest = file, hashlib.sha256()
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.truncate(self._descriptor, file.bytes)

    def __enter__(self) -> "_Sink":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def write(self, row: int, content: memoryview) -> None:
        """Write what the images from `row` on have in this file."""
        content, offset = content.cast("B"), row * self.file.row_bytes
        while content.nbytes:
            count = os.pwrite(self._descriptor, content, offset)
            content, offset = content[count:], offset + count

    def hash(self, first: int, end: int) -> None:
        """Add the images from `first` to before `end` to the digest."""
        buffer = memoryview(bytearray(_SLICE_BYTES))
        stop = end * self.file.row_bytes
        for offset in range(first * self.file.row_bytes, stop, _SLICE_BYTES):
            piece = buffer[: min(_SLICE_BYTES, stop - offset)]
            if os.preadv(self._descriptor, [piece], offset) != piece.nbytes:
                raise OSError(f"{self._path.name} has been cut off")
            self.digest.update(piece)

    def finish(self) -> None:
        """Give the file its name, once its bytes are on the disk: a full size must mean full content."""
        os.fsync(self._descriptor)
        if self.file.path is not None:
            self._path.replace(self.file.path)
