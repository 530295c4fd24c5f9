"""Our data sets, decoded once per node and memory-mapped by each of its processes.

Shapes: N images, H rows, W columns, C channels, F factors.
"""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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

    The first process decodes the parts into `<cache>/<sha256>.images.u8` (labels and factors beside it),
    checking every hash; later ones map the same files and share their pages. If several start at once, each
    decodes and one file wins. A damaged part leaves no file, and no part is inflated beyond the size in the
    manifest.

    Raises DataError if the data set is missing or damaged, or the cache cannot be written.
    """
    manifest = read_manifest(store)
    directory = default_cache_directory() if cache_directory is None else cache_directory
    files = _files(manifest, directory)
    need = sum(file.bytes for file in files)
    try:
        # Only files of the right size count; a partial one never gets its name.
        if not all(_is_whole(file.path, file.bytes) for file in files):
            directory.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(directory).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _decode(store, manifest, files)
        found = {
            file.what: np.memmap(file.path, file.dtype, "r", shape=file.shape)
            for file in files
            if file.path is not None
        }
        return ImageSet(found["images"], found.get("labels"), manifest, found.get("factors"))
    except OSError as error:
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
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


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


def _is_whole(path: Path | None, size: int) -> bool:
    return path is None or (path.is_file() and path.stat().st_size == size)


def _decode(store: Store, manifest: DatasetManifest, files: Sequence[_File]) -> None:
    """Write pixels, labels and factors of all parts to their files; each appears complete or not at all."""
    hashes = [hashlib.sha256() for _ in files]
    with contextlib.ExitStack() as stack:
        sinks = [None if file.path is None else stack.enter_context(_appearing(file.path)) for file in files]
        for part in manifest.parts:
            for contents in _decoded(store, part, manifest):
                for content, found, sink in zip(contents, hashes, sinks, strict=True):
                    found.update(content)
                    if sink is not None:
                        sink.write(content)
        # Checked inside the block, so that files with wrong content never appear.
        for file, found in zip(files, hashes, strict=True):
            if file.sha256 not in {None, found.hexdigest()}:
                what = "parts" if file.what == "images" else file.what
                raise DataError(
                    f"{store.uri}: the {what} are not those of the manifest; ingest the data set again"
                )


def _decoded(
    store: Store, part: Part, manifest: DatasetManifest
) -> Iterator[tuple[memoryview, memoryview, memoryview]]:
    """Yield pixels (views of Arrow's memory), labels and factors, some rows at a time."""
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
            options = {"row_groups": [group], "columns": _columns(manifest), "use_threads": False}
            for batch in file.iter_batches(rows, **options):
                image, label = batch.column(0), batch.column(1)
                if image.null_count:
                    raise ValueError("it has images without pixels")
                start = image.offset * width
                pixels = memoryview(image.buffers()[1])[start : start + len(image) * width]
                labels = label.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i4").data
                yield pixels, labels, _factors(batch, manifest)


def _columns(manifest: DatasetManifest) -> list[str]:
    return [*_COLUMNS, *(factor.name for factor in manifest.factors)]


def _factors(batch: pa.RecordBatch, manifest: DatasetManifest) -> memoryview:
    """Return the factors of some rows, row by row; ValueError if a number is no category's index."""
    table_NF = np.empty((batch.num_rows, len(manifest.factors)), "<i4")
    for index, factor in enumerate(manifest.factors):
        column = batch.column(2 + index)
        if column.null_count:
            raise ValueError(f"it has images without {factor.name}")
        table_NF[:, index] = column.to_numpy(zero_copy_only=False)
        if len(table_NF) and not 0 <= table_NF[:, index].min() <= table_NF[:, index].max() < len(
            factor.categories
        ):
            raise ValueError(
                f"it has a {factor.name} that is none of its {len(factor.categories)} categories"
            )
    return memoryview(table_NF.tobytes())


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
    numbers = _columns(manifest)[1:]
    if types != [("image", pa.binary(width)), *((name, pa.int32()) for name in numbers)]:
        raise ValueError(f"its columns are {types}")
    lying = [file.schema.column(index) for index in range(metadata.num_columns)]
    found = [(column.path, column.physical_type, column.length) for column in lying]
    if found != [("image", "FIXED_LEN_BYTE_ARRAY", width), *((name, "INT32", 0) for name in numbers)]:
        raise ValueError(f"its columns lie as {found}")
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if metadata.num_rows != part.images or sum(rows) != part.images or min(rows) < 0:
        raise ValueError(f"it has {metadata.num_rows} rows, in groups {sum(rows)}; not {part.images}")
    for group in groups:
        _check_column(memoryview(data), group.column(0), group.num_rows, width)
        for index in range(1, 1 + len(numbers)):
            _check_column(memoryview(data), group.column(index), group.num_rows, 4)
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
