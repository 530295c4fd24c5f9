"""Write our data sets: Parquet parts of raw pixels under one prefix, and last a manifest.

Parts have their hash in their name, so replacing a data set never touches the old one before the new manifest
is in place. Names have no "of 8": a stream's length is unknown; the manifest has the number.

Shapes: N images, H rows, W columns, C channels, F factors.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from jebm.data.manifest import (
    MANIFEST,
    PART_NAME,
    DatasetManifest,
    Part,
    dataset_exists,
    encode_manifest,
)
from jebm.data.source import Batch, Source
from jebm.errors import DataError, StoreError
from jebm.store.protocol import Store

__all__ = ["write_dataset"]

_ROW_GROUP_IMAGES = 1_000
_PART_PIXELS_LIMIT = 1 << 30  # a part is held in memory


def write_dataset(
    source: Source,
    store: Store,
    *,
    images_per_part: int = 8192,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> DatasetManifest:
    """Write all images of a source as a data set and return its manifest, written last.

    Holds one part in memory. `progress` is called with the number of images written so far, after each
    part. On any failure everything written is deleted, and an existing data set stays as it was.

    Raises DataError if the source is damaged or empty, or a data set exists and `overwrite` is not set.
    """
    exists = dataset_exists(store)
    if exists and not overwrite:
        raise DataError(f"{store.uri}: a data set exists here; overwrite it, or write to another place")
    kept = {info.key for info in store.list("part-")} if exists else set()
    writer = _Writer(source, store)
    try:
        for part in _parts(source, images_per_part):
            writer.write(part)
            if progress is not None:
                progress(writer.images)
        manifest = writer.manifest()
        store.put(MANIFEST, encode_manifest(manifest))
    except BaseException:
        ours = [part.name for part in writer.parts if part.name not in kept]
        # The manifest first: without it the rest is invisible.
        with contextlib.suppress(StoreError):
            store.delete(ours if exists else [MANIFEST, *ours])
        raise
    # Leftovers of a replaced data set or of a killed writer.
    present = {part.name for part in manifest.parts}
    found = [info.key for info in store.list("part-")]
    store.delete(key for key in found if PART_NAME.fullmatch(key) and key not in present)
    return manifest


@dataclass(frozen=True)
class _Part:
    """The content of one part."""

    images_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int32]
    factors_NF: npt.NDArray[np.int32]

    def first(self, count: int) -> "_Part":
        return _Part(self.images_NHWC[:count], self.labels_N[:count], self.factors_NF[:count])


class _Writer:
    """Writes parts and collects their entries for the manifest."""

    def __init__(self, source: Source, store: Store) -> None:
        self.parts: list[Part] = []
        self.images = 0
        self._source, self._store = source, store
        self._pixels, self._labels, self._factors = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self._labelled = False

    def write(self, content: _Part) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(
            _table(content, self._source),
            sink,
            row_group_size=_ROW_GROUP_IMAGES,
            compression="zstd",
            use_dictionary=False,
        )
        data = sink.getvalue().to_pybytes()
        digest = hashlib.sha256(data).hexdigest()
        part = Part(
            f"part-{len(self.parts):05d}-{digest[:8]}.parquet", len(content.labels_N), len(data), digest
        )
        # Listed before it is written: a failed write may leave something behind.
        self.parts.append(part)
        self._store.put(part.name, data)
        self.images += part.images
        self._pixels.update(content.images_NHWC.data)
        self._labels.update(content.labels_N.astype("<i4").data)
        self._factors.update(content.factors_NF.astype("<i4").tobytes())
        self._labelled = self._labelled or bool((content.labels_N >= 0).any())

    def manifest(self) -> DatasetManifest:
        source = self._source
        if self.images == 0:
            raise DataError(f"{source.name}: no images to write; give a source that has some")
        return DatasetManifest(
            name=source.name,
            split=source.split,
            height=source.height,
            width=source.width,
            channels=source.channels,
            images=self.images,
            parts=tuple(self.parts),
            sha256=self._pixels.hexdigest(),
            labels_sha256=self._labels.hexdigest() if self._labelled else None,
            source=source.description,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            factors=source.factors,
            factors_sha256=self._factors.hexdigest() if source.factors else None,
        )


def _parts(source: Source, images_per_part: int) -> Iterator[_Part]:
    """Yield one part at a time, in memory that the next part reuses."""
    shape = (source.height, source.width, source.channels)
    images_per_part = max(1, min(images_per_part, _PART_PIXELS_LIMIT // math.prod(shape)))
    images_NHWC = np.empty((images_per_part, *shape), np.uint8)
    labels_N = np.empty(images_per_part, np.int32)
    factors_NF = np.empty((images_per_part, len(source.factors)), np.int32)
    part = _Part(images_NHWC, labels_N, factors_NF)
    filled = 0
    for batch in source.batches():
        _check(batch, source)
        # A batch may end one part and begin the next.
        start = 0
        while start < len(batch.images_NHWC):
            stop = min(len(batch.images_NHWC), start + images_per_part - filled)
            end = filled + stop - start
            images_NHWC[filled:end] = batch.images_NHWC[start:stop]
            labels_N[filled:end] = -1 if batch.labels_N is None else batch.labels_N[start:stop]
            if batch.factors_NF is not None:
                factors_NF[filled:end] = batch.factors_NF[start:stop]
            start, filled = stop, end
            if filled == images_per_part:
                yield part
                filled = 0
    if filled:
        yield part.first(filled)


def _check(batch: Batch, source: Source) -> None:
    """Raise DataError unless a batch has the announced shape, valid labels, and a row of factors an image."""
    shape = (source.height, source.width, source.channels)
    if batch.images_NHWC.dtype != np.uint8 or batch.images_NHWC.shape[1:] != shape:
        found = f"{batch.images_NHWC.dtype} {batch.images_NHWC.shape[1:]}"
        raise DataError(f"{source.name}: images of {found} where uint8 {shape} was announced")
    # Any other negative label would be read back as −1 and change the labels' hash.
    if batch.labels_N is not None and len(batch.labels_N) and batch.labels_N.min() < -1:
        raise DataError(f"{source.name}: label {batch.labels_N.min()} is less than -1, which is none")
    rows = (0, 0) if batch.factors_NF is None else batch.factors_NF.shape
    if source.factors and rows != (len(batch.images_NHWC), len(source.factors)):
        raise DataError(f"{source.name}: {rows[0]} rows of factors for {len(batch.images_NHWC)} images")


def _table(part: _Part, source: Source) -> pa.Table:
    images_NHWC, labels_N = part.images_NHWC, part.labels_N
    pixel_type = pa.binary(math.prod(images_NHWC.shape[1:]))
    pixels = pa.Array.from_buffers(pixel_type, len(images_NHWC), [None, pa.py_buffer(images_NHWC)])
    description = {"name": source.name, "split": source.split, "format": source.description.format}
    metadata = {
        "height": str(source.height),
        "width": str(source.width),
        "channels": str(source.channels),
        "sha256": hashlib.sha256(images_NHWC.data).hexdigest(),
        "source": json.dumps(description),
    }
    fields = [pa.field("image", pixel_type, nullable=False), pa.field("label", pa.int32())]
    fields += [pa.field(factor.name, pa.int32(), nullable=False) for factor in source.factors]
    labels = pa.array(labels_N, pa.int32(), mask=labels_N < 0)
    columns = [pa.array(numbers_N, pa.int32()) for numbers_N in part.factors_NF.T]
    return pa.table([pixels, labels, *columns], schema=pa.schema(fields, metadata))
