"""Our data sets, decoded once per node and memory-mapped by each of its processes.

Shapes: N images, H rows, W columns, C channels.
"""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from jebm.data.manifest import DatasetManifest, Part, most_bytes, read_manifest
from jebm.data.pages import pages_of
from jebm.errors import DataError
from jebm.paths import cache_folder, expanded
from jebm.store.protocol import Store

__all__ = ["ImageSet", "default_cache_directory", "load_images", "shared_images"]

_COLUMNS = ("image", "label")
_MOST_COLUMNS = 1_000
_BATCH_IMAGES = 1_000
_BATCH_BYTES = 64 << 20
_ENCODINGS = {0, 2, 3, 8}
"""Plain, and dictionary indices: no value needs more memory than itself. In other encodings a value may be a
prefix of the next, so that a small page grows large."""


@dataclass(frozen=True)
class ImageSet:
    """A read-only data set in memory shared by all processes of a node."""

    images_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int32] | None  # −1 for an image without one
    manifest: DatasetManifest


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

    The first process decodes the parts into `<cache>/<sha256>.images.u8` (and labels beside it), checking
    every hash; later ones map the same file and share its pages. If several start at once, each decodes and
    one file wins. A damaged part leaves no file, and no part is inflated beyond the size in the manifest.

    Raises DataError if the data set is missing or damaged, or the cache cannot be written.
    """
    manifest = read_manifest(store)
    directory = default_cache_directory() if cache_directory is None else cache_directory
    images_path = directory / f"{manifest.sha256}.images.u8"
    labels_path = directory / f"{manifest.labels_sha256}.labels.i32" if manifest.labels_sha256 else None
    need = math.prod(manifest.shape) + 4 * manifest.images
    # Only a file of the right size counts; a partial one never gets this name.
    whole = _is_whole(images_path, math.prod(manifest.shape)) and (
        labels_path is None or _is_whole(labels_path, 4 * manifest.images)
    )
    try:
        if not whole:
            directory.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(directory).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _decode(store, manifest, images_path, labels_path)
        images_NHWC = np.memmap(images_path, np.uint8, "r", shape=manifest.shape)
        labels_N = None if labels_path is None else np.memmap(labels_path, "<i4", "r", shape=manifest.images)
        return ImageSet(images_NHWC, labels_N, manifest)
    except OSError as error:
        reason = f"{directory}: the image cache cannot be used ({error.strerror or error})"
        raise DataError(f"{reason}; set JEBM_CACHE to a folder with {need / 1e6:.0f} MB free") from error


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _decode(store: Store, manifest: DatasetManifest, images_path: Path, labels_path: Path | None) -> None:
    """Write pixels and labels of all parts to the two paths; each appears whole or not at all."""
    pixels, labels = hashlib.sha256(), hashlib.sha256()
    with contextlib.ExitStack() as stack:
        image_file = stack.enter_context(_appearing(images_path))
        label_file = stack.enter_context(_appearing(labels_path)) if labels_path is not None else None
        for part in manifest.parts:
            for image_bytes, label_bytes in _decoded(store, part, manifest):
                pixels.update(image_bytes)
                image_file.write(image_bytes)
                labels.update(label_bytes)
                if label_file is not None:
                    label_file.write(label_bytes)
        # Checked inside the block, so that files with wrong content never appear.
        if pixels.hexdigest() != manifest.sha256:
            raise DataError(
                f"{store.uri}: the parts are not those of the manifest; ingest the data set again"
            )
        if manifest.labels_sha256 not in {None, labels.hexdigest()}:
            raise DataError(
                f"{store.uri}: the labels are not those of the manifest; ingest the data set again"
            )


def _decoded(store: Store, part: Part, manifest: DatasetManifest) -> Iterator[tuple[memoryview, memoryview]]:
    """Yield pixels (views of Arrow's memory) and labels, some rows at a time."""
    place = f"{store.uri}/{part.name}"
    # Check the size before reading: the object may be larger than memory.
    found = next((info.size for info in store.list(part.name) if info.key == part.name), part.bytes)
    if found != part.bytes:
        raise DataError(f"{place}: damaged ({found} of {part.bytes} bytes); ingest the data set again")
    data = store.get(part.name)
    if len(data) != part.bytes or hashlib.sha256(data).hexdigest() != part.sha256:
        raise DataError(f"{place}: damaged (its sha256 differs); ingest the data set again")
    with _foreign_errors(place):
        file = _opened(data, part, manifest)
        width = manifest.image_bytes
        rows = min(_BATCH_IMAGES, max(1, _BATCH_BYTES // width))
        for group in range(file.num_row_groups):
            options = {"row_groups": [group], "columns": list(_COLUMNS), "use_threads": False}
            for batch in file.iter_batches(rows, **options):
                image, label = batch.column(0), batch.column(1)
                if image.null_count:
                    raise ValueError("it has images without pixels")
                start = image.offset * width
                pixels = memoryview(image.buffers()[1])[start : start + len(image) * width]
                yield pixels, label.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i4").data


@contextlib.contextmanager
def _foreign_errors(place: str) -> Iterator[None]:
    """Turn whatever Arrow raises about a part, and our own checks' ValueErrors, into a DataError."""
    try:
        yield
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataError(
            f"{place}: not the part that the manifest describes ({reason}); ingest the data set again"
        ) from error


def _opened(data: bytes, part: Part, manifest: DatasetManifest) -> pq.ParquetFile:
    """Open a part after checking its metadata against the manifest; ValueError if anything differs.

    Only metadata is read: the footer's columns, row groups and sizes, and the header of every page. Later
    reads then inflate no page beyond the size in its header, and no more values than the row group has rows.
    """
    file = pq.ParquetFile(pa.BufferReader(data), thrift_container_size_limit=part.images + _MOST_COLUMNS)
    metadata, width = file.metadata, manifest.image_bytes
    # Check both Arrow's schema and the physical columns: the file controls each separately.
    types = [(field.name, field.type) for field in file.schema_arrow]
    if types != [("image", pa.binary(width)), ("label", pa.int32())]:
        raise ValueError(f"its columns are {types}")
    lying = [file.schema.column(index) for index in range(metadata.num_columns)]
    found = [(column.path, column.physical_type, column.length) for column in lying]
    if found != [("image", "FIXED_LEN_BYTE_ARRAY", width), ("label", "INT32", 0)]:
        raise ValueError(f"its columns lie as {found}")
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if metadata.num_rows != part.images or sum(rows) != part.images or min(rows) < 0:
        raise ValueError(f"it has {metadata.num_rows} rows, in groups {sum(rows)}; not {part.images}")
    for group in groups:
        _check_column(memoryview(data), group.column(0), group.num_rows, width)
        _check_column(memoryview(data), group.column(1), group.num_rows, 4)
    return file


def _check_column(data: memoryview, column: pq.ColumnChunkMetaData, rows: int, width: int) -> None:
    """Raise ValueError unless a column's pages hold `rows` values of `width` bytes and little else."""
    name = column.path_in_schema
    most = most_bytes(rows, width)
    if column.num_values != rows or column.total_uncompressed_size > most or column.file_path:
        raise ValueError(f"column {name} is said to have other values than its row group, or larger ones")
    size = values = 0
    for page in pages_of(data, column):
        size += page.bytes
        values += 0 if page.is_dictionary else page.values
        if page.encoding not in _ENCODINGS:
            raise ValueError(f"column {name} has a page in encoding {page.encoding}")
        if size > most or page.values > rows or values > rows:
            raise ValueError(f"column {name} inflates to more than {rows} values of {width} bytes")


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name once complete; if another process was faster, its file stays."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".decoding-", delete=False) as file:
        try:
            yield file
            file.flush()
            if not _is_whole(path, file.tell()):
                Path(file.name).replace(path)
        finally:
            Path(file.name).unlink(missing_ok=True)
