"""One part of a data set, fetched and decoded some row groups at a time, everything in it checked before use.

Shapes: N images, F factors.
"""

import contextlib
import hashlib
import mmap
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jebm.data.manifest import DatasetManifest, Part, most_bytes
from jebm.data.pages import pages_of
from jebm.errors import DataError
from jebm.store.protocol import Store

__all__ = ["decoded"]

_COLUMNS = ("image", "label")
_MOST_COLUMNS = 1_000
_BATCH_IMAGES = 1_000
_BATCH_BYTES = 4 << 20
_FETCH_BYTES = 16 << 20  # at least so many at once: a request costs tens of milliseconds
_FOOTER_BYTES = 64 << 10  # holds most footers
_ENCODINGS = {0, 2, 3, 8}
"""Plain, and dictionary indices: no value needs more memory than itself. In other encodings a value may be a
prefix of the next, so that a small page grows large."""


def decoded(store: Store, part: Part, manifest: DatasetManifest) -> Iterator[dict[str, memoryview]]:
    """Yield the pixels (views of Arrow's memory), labels and factors of some rows at a time, in order.

    Holds a row group and a batch in memory; each byte of the part is requested once. The part is intact only
    if the iteration ends: its sha256 is complete with its last byte.

    Raises:
        DataError: the part is not the one that the manifest describes.
    """
    place = f"{store.uri}/{part.name}"
    # Check the size before reading: memory is reserved for it.
    info = store.head(part.name)
    if info is not None and info.size != part.bytes:
        raise DataError(f"{place}: damaged ({info.size} of {part.bytes} bytes); ingest the data set again")
    with _foreign_errors(place):
        window = _Window(store, part)
        file = _opened(window, part, manifest)
        width = manifest.image_bytes
        rows = min(_BATCH_IMAGES, max(1, _BATCH_BYTES // width))
        for group in range(file.num_row_groups):
            _fetch_group(window, file.metadata.row_group(group), width)
            options = {"row_groups": [group], "columns": _columns(manifest), "use_threads": False}
            for batch in file.iter_batches(rows, **options):
                image, label = batch.column(0), batch.column(1)
                if image.null_count:
                    raise ValueError("it has images without pixels")
                start = image.offset * width
                yield {
                    "images": memoryview(image.buffers()[1])[start : start + len(image) * width],
                    "labels": label.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i4").data,
                    "factors": _factors(batch, manifest),
                }
        window.fetch(part.bytes)


class _Window:
    """A part at its full length in virtual memory, of which only what is needed now has been fetched."""

    def __init__(self, store: Store, part: Part) -> None:
        self._store, self._part = store, part
        self._memory = mmap.mmap(-1, part.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data = memoryview(self._memory)
        self._digest = hashlib.sha256()
        self._freed = self._hashed = 0
        self._footer = part.bytes  # from here on fetched, too

    def fetch_footer(self) -> None:
        """Fetch the end with Parquet's metadata, or all of a small part; ValueError if that cannot be."""
        size = self._part.bytes
        if size <= _FETCH_BYTES:
            self.fetch(size)
            return
        self._read(size - _FOOTER_BYTES, size)
        self._footer = size - _FOOTER_BYTES
        # The footer ends with its own length and four letters.
        begin = size - 8 - int.from_bytes(self.data[-8:-4], "little")
        if begin < 0:
            raise ValueError("its footer is longer than itself")
        if begin < self._footer:
            self._read(begin, self._footer)
            self._footer = begin

    def fetch(self, end: int) -> None:
        """Fetch and hash the bytes up to `end`; DataError if they are the last and the sha256 differs."""
        begin, size = self._hashed, self._part.bytes
        if begin < end:
            end = min(max(end, begin + _FETCH_BYTES), size)
            self._read(begin, min(end, self._footer))
            self._digest.update(self.data[begin:end])
            self._hashed = end
        if end == size and self._digest.hexdigest() != self._part.sha256:
            place = f"{self._store.uri}/{self._part.name}"
            raise DataError(f"{place}: damaged (its sha256 differs); ingest the data set again")

    def free(self, end: int) -> None:
        """Give back the memory of the bytes before `end`, which read as zeros from then on."""
        end = min(end, self._hashed) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > self._freed:
            self._memory.madvise(mmap.MADV_DONTNEED, self._freed, end - self._freed)
            self._freed = end

    def _read(self, begin: int, end: int) -> None:
        if begin < end:
            self._store.read_into(self._part.name, begin, [self.data[begin:end]])


def _fetch_group(window: _Window, group: pq.RowGroupMetaData, width: int) -> None:
    """Fetch a row group, free what lies before it, and check its pages; ValueError if they are wrong."""
    columns = [group.column(index) for index in range(group.num_columns)]
    begins = [_begin(column) for column in columns]
    end = max(begin + column.total_compressed_size for begin, column in zip(begins, columns, strict=True))
    if not 0 <= min(begins) <= end <= len(window.data):
        raise ValueError("a row group lies outside the file")
    window.free(min(begins))
    window.fetch(end)
    for column, size in zip(columns, (width, *(4 for _ in columns[1:])), strict=True):
        _check_column(window.data, column, group.num_rows, size)


def _begin(column: pq.ColumnChunkMetaData) -> int:
    """Return where a column's pages begin, as `pages_of` and Arrow have it."""
    begin: int = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < begin:
        begin = column.dictionary_page_offset
    return begin


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


def _opened(window: _Window, part: Part, manifest: DatasetManifest) -> pq.ParquetFile:
    """Open a part after checking its metadata against the manifest; ValueError if anything differs.

    Only the footer is read: columns, row groups and sizes. `_fetch_group` checks the header of every page.
    Later reads then inflate no page beyond the size in its header, and no more values than the row group has
    rows.
    """
    window.fetch_footer()
    source = pa.BufferReader(pa.py_buffer(window.data))
    file = pq.ParquetFile(source, thrift_container_size_limit=part.images + _MOST_COLUMNS)
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
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if metadata.num_rows != part.images or sum(rows) != part.images or min(rows) < 0:
        raise ValueError(f"it has {metadata.num_rows} rows, in groups {sum(rows)}; not {part.images}")
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
