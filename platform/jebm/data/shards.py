"""Data sets of our own: Parquet parts of raw pixels under one prefix, with a manifest that is written last.

    part-00000-3f9a2c1e.parquet   image: fixed_size_binary[H·W·C], label: int32; row groups of 1,000; zstd
    part-00001-…                  the second number is the beginning of the part's own sha256
    dataset.json                  the manifest: a data set exists when this does

Parts carry their hash in their name, so that replacing a data set never touches the old one before the new
manifest is in place. They do not carry "of 8": a stream does not know its length; the manifest does.

Shapes: N images, H rows, W columns, C channels.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from jebm.data.sources import Source, SourceDescription, SourceFile
from jebm.errors import DataError, StoreError
from jebm.paths import cache_folder, expanded

__all__ = [
    "MANIFEST",
    "Blobs",
    "DatasetManifest",
    "ImageSet",
    "Part",
    "dataset_exists",
    "default_cache_directory",
    "load_images",
    "read_manifest",
    "write_dataset",
]

MANIFEST = "dataset.json"

_FORMAT, _VERSION = "jebm-dataset", 1
_ROW_GROUP_IMAGES = 1_000
_PART_NAME = re.compile(r"part-\d{5}-[0-9a-f]{8}\.parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


class BlobInfo(Protocol):
    """What a listing tells of one object."""

    @property
    def key(self) -> str:
        """The key, relative to the store's URI."""

    @property
    def size(self) -> int:
        """Bytes."""


class Blobs(Protocol):
    """What this room needs of an object store. Keys are relative to `uri`; `get` of none is a StoreError."""

    @property
    def uri(self) -> str:
        """The prefix, for messages."""

    def get(self, key: str, /) -> bytes:
        """Return the whole object."""

    def put(self, key: str, data: bytes, /) -> object:
        """Write the whole object, or nothing."""

    def list(self, prefix: str, /) -> Iterable[BlobInfo]:
        """Return what lies under keys that begin with `prefix`."""

    def delete(self, keys: Iterable[str], /) -> None:
        """Delete objects; absent ones are fine."""


@dataclass(frozen=True)
class Part:
    """One Parquet object of a data set."""

    name: str
    images: int
    bytes: int
    sha256: str  # of the object


@dataclass(frozen=True)
class DatasetManifest:
    """All that is known of a data set without reading its pixels."""

    name: str
    split: str
    height: int
    width: int
    channels: int
    images: int
    parts: tuple[Part, ...]
    sha256: str  # of the pixels of all images in order, however they are cut into parts
    labels_sha256: str | None  # of the labels as little-endian int32; None where there are none
    source: SourceDescription
    created: str  # ISO time, UTC

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all images: (N, H, W, C)."""
        return self.images, self.height, self.width, self.channels


@dataclass(frozen=True)
class ImageSet:
    """A data set in memory that all processes of a node share; read-only."""

    images_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int32] | None  # −1 where one image has none
    manifest: DatasetManifest


def default_cache_directory() -> Path:
    """Return where decoded images are kept: $JEBM_CACHE, or `data` in this user's `cache_folder`.

    Raises DataError if there is no such folder; it names JEBM_CACHE.
    """
    named = os.environ.get("JEBM_CACHE")
    try:
        return expanded(named) if named else cache_folder() / "data"
    except ValueError as error:
        raise DataError(f"JEBM_CACHE: {error}") from error
    except OSError as error:
        raise DataError(f"{error}; set JEBM_CACHE to a folder that can be written") from error


# ------------------------------------------------------------------------------------------------ writing


def write_dataset(
    source: Source,
    store: Blobs,
    *,
    images_per_part: int = 8192,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> DatasetManifest:
    """Write all images of a source as a data set and return its manifest, which is written last.

    Holds one part in memory. `progress` is called with the number of images written so far, after each
    part. On any failure what was written is deleted again, and a data set that was there stays as it was.

    Raises DataError where the source is damaged or empty, or a data set exists and `overwrite` is not set.
    """
    exists = dataset_exists(store)
    if exists and not overwrite:
        raise DataError(f"{store.uri}: a data set exists here; overwrite it, or write to another place")
    kept = {info.key for info in store.list("part-")} if exists else set()
    writer = _Writer(source, store)
    try:
        for images_NHWC, labels_N in _parts(source, images_per_part):
            writer.write(images_NHWC, labels_N)
            if progress is not None:
                progress(writer.images)
        manifest = writer.manifest()
        store.put(MANIFEST, json.dumps(_to_json(manifest), indent=1).encode())
    except BaseException:
        ours = [part.name for part in writer.parts if part.name not in kept]
        # The manifest first: without it nobody sees the rest.
        with contextlib.suppress(StoreError):
            store.delete(ours if exists else [MANIFEST, *ours])
        raise
    # Of a replaced data set, or of a process that was killed while it wrote one.
    present = {part.name for part in manifest.parts}
    found = [info.key for info in store.list("part-")]
    store.delete(key for key in found if _PART_NAME.fullmatch(key) and key not in present)
    return manifest


class _Writer:
    """Writes parts and keeps what the manifest will say of them."""

    def __init__(self, source: Source, store: Blobs) -> None:
        self.parts: list[Part] = []
        self.images = 0
        self._source, self._store = source, store
        self._pixels, self._labels = hashlib.sha256(), hashlib.sha256()
        self._labelled = False

    def write(self, images_NHWC: npt.NDArray[np.uint8], labels_N: npt.NDArray[np.int32]) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(
            _table(images_NHWC, labels_N, self._source),
            sink,
            row_group_size=_ROW_GROUP_IMAGES,
            compression="zstd",
            use_dictionary=False,
        )
        data = sink.getvalue().to_pybytes()
        digest = hashlib.sha256(data).hexdigest()
        part = Part(f"part-{len(self.parts):05d}-{digest[:8]}.parquet", len(images_NHWC), len(data), digest)
        # On the list before it is written: a failed write may have left something behind.
        self.parts.append(part)
        self._store.put(part.name, data)
        self.images += len(images_NHWC)
        self._pixels.update(images_NHWC.data)
        self._labels.update(labels_N.astype("<i4").data)
        self._labelled = self._labelled or bool((labels_N >= 0).any())

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
        )


def _parts(
    source: Source, images_per_part: int
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]]:
    """Yield images and labels of one part at a time, in memory that the next part uses again."""
    shape = (source.height, source.width, source.channels)
    images_NHWC = np.empty((images_per_part, *shape), np.uint8)
    labels_N = np.empty(images_per_part, np.int32)
    filled = 0
    for batch in source.batches():
        if batch.images_NHWC.dtype != np.uint8 or batch.images_NHWC.shape[1:] != shape:
            found = f"{batch.images_NHWC.dtype} {batch.images_NHWC.shape[1:]}"
            raise DataError(f"{source.name}: images of {found} where uint8 {shape} was announced")
        start = 0
        while start < len(batch.images_NHWC):
            stop = min(len(batch.images_NHWC), start + images_per_part - filled)
            end = filled + stop - start
            images_NHWC[filled:end] = batch.images_NHWC[start:stop]
            labels_N[filled:end] = -1 if batch.labels_N is None else batch.labels_N[start:stop]
            start, filled = stop, end
            if filled == images_per_part:
                yield images_NHWC, labels_N
                filled = 0
    if filled:
        yield images_NHWC[:filled], labels_N[:filled]


def _table(images_NHWC: npt.NDArray[np.uint8], labels_N: npt.NDArray[np.int32], source: Source) -> pa.Table:
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
    labels = pa.array(labels_N, pa.int32(), mask=labels_N < 0)
    return pa.table([pixels, labels], schema=pa.schema(fields, metadata))


# ----------------------------------------------------------------------------------------------- manifest


def dataset_exists(store: Blobs) -> bool:
    """Return whether a data set (its manifest) is there; StoreError where the store cannot be asked."""
    return any(info.key == MANIFEST for info in store.list(MANIFEST))


def read_manifest(store: Blobs) -> DatasetManifest:
    """Return the checked manifest; DataError where there is none or it is damaged."""
    if not dataset_exists(store):
        raise DataError(
            f"{store.uri}: no data set here; make one with jobs/ingest.py SOURCE --output {store.uri}"
        )
    place = f"{store.uri}/{MANIFEST}"
    try:
        content = json.loads(store.get(MANIFEST))
        manifest = _from_json(content)
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["nested too deeply"])[0]
        raise DataError(f"{place}: not a data set manifest ({reason}); ingest the data set again") from error
    return manifest


def _to_json(manifest: DatasetManifest) -> dict[str, object]:
    return {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(manifest)}


def _from_json(content: object) -> DatasetManifest:
    """Check every field; ValueError names the one that is wrong."""
    fields = _Fields(content, "")
    if fields.text("format") != _FORMAT or fields.count("version") != _VERSION:
        raise ValueError(f"its format is not {_FORMAT} version {_VERSION}")
    parts = tuple(
        Part(part.text("name"), part.count("images"), part.count("bytes"), part.sha256("sha256"))
        for part in fields.records("parts")
    )
    source = _Fields(fields.value("source", dict), "source.")
    files = tuple(
        SourceFile(file.text("name"), file.count("bytes", least=0), file.sha256("sha256"))
        for file in source.records("files")
    )
    transforms = source.value("transforms", list)
    manifest = DatasetManifest(
        name=fields.text("name"),
        split=fields.text("split"),
        height=fields.count("height"),
        width=fields.count("width"),
        channels=fields.count("channels"),
        images=fields.count("images"),
        parts=parts,
        sha256=fields.sha256("sha256"),
        labels_sha256=None if fields.absent("labels_sha256") else fields.sha256("labels_sha256"),
        source=SourceDescription(files, source.text("format"), tuple(str(entry) for entry in transforms)),
        created=fields.text("created"),
    )
    # Names become keys and file names, so that nothing but our own form may pass.
    if not all(_PART_NAME.fullmatch(part.name) for part in parts) or len({p.name for p in parts}) != len(
        parts
    ):
        raise ValueError("field parts has a name that is no part name, or one twice")
    if sum(part.images for part in parts) != manifest.images:
        raise ValueError("field images is not the sum over the parts")
    return manifest


class _Fields:
    """A JSON object whose fields are asked for by type; ValueError names the field."""

    def __init__(self, content: object, place: str) -> None:
        if not isinstance(content, Mapping):
            raise ValueError(f"{place.rstrip('.') or 'it'} is not a JSON object")
        self._content, self._place = content, place

    def absent(self, key: str) -> bool:
        return self._content.get(key) is None

    def value(self, key: str, kind: type[_T]) -> _T:
        value = self._content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"field {self._place}{key} is missing or not of type {kind.__name__}")
        return value

    def text(self, key: str) -> str:
        return self.value(key, str)

    def count(self, key: str, least: int = 1) -> int:
        value = self.value(key, int)
        if value < least:
            raise ValueError(f"field {self._place}{key} is less than {least}")
        return value

    def sha256(self, key: str) -> str:
        value = self.text(key)
        if not _SHA256.fullmatch(value):
            raise ValueError(f"field {self._place}{key} is not a sha256")
        return value

    def records(self, key: str) -> list["_Fields"]:
        entries = self.value(key, list)
        return [_Fields(entry, f"{self._place}{key}[{index}].") for index, entry in enumerate(entries)]


# ------------------------------------------------------------------------------------------------ reading


def load_images(store: Blobs, cache_directory: Path | None = None) -> ImageSet:
    """Return the images of a data set, mapped into memory from one decoded copy on this node.

    The first process decodes the parts into `<cache>/<sha256>.images.u8` (and labels beside it), every hash
    checked on the way; later ones map the same file, and share its pages. Several may start at once: each
    decodes, one file wins. A part that is damaged leaves no file.

    Raises DataError for a missing or damaged data set, or a cache that cannot be written.
    """
    manifest = read_manifest(store)
    directory = default_cache_directory() if cache_directory is None else cache_directory
    images_path = directory / f"{manifest.sha256}.images.u8"
    labels_path = directory / f"{manifest.labels_sha256}.labels.i32" if manifest.labels_sha256 else None
    whole = _is_whole(images_path, math.prod(manifest.shape)) and (
        labels_path is None or _is_whole(labels_path, 4 * manifest.images)
    )
    try:
        if not whole:
            directory.mkdir(parents=True, exist_ok=True)
            _decode(store, manifest, images_path, labels_path)
        images_NHWC = np.memmap(images_path, np.uint8, "r", shape=manifest.shape)
        labels_N = None if labels_path is None else np.memmap(labels_path, "<i4", "r", shape=manifest.images)
        return ImageSet(images_NHWC, labels_N, manifest)
    except OSError as error:
        need = f"{math.prod(manifest.shape) / 1e6:.0f} MB"
        raise DataError(
            f"{directory}: the image cache cannot be used ({error.strerror}); set JEBM_CACHE to a folder with"
            f" {need} free"
        ) from error


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _decode(store: Blobs, manifest: DatasetManifest, images_path: Path, labels_path: Path | None) -> None:
    """Write pixels and labels of all parts to the two paths, which appear whole or not at all."""
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
        # Inside, so that files whose content is wrong never appear.
        if pixels.hexdigest() != manifest.sha256:
            raise DataError(
                f"{store.uri}: the parts are not those of the manifest; ingest the data set again"
            )
        if manifest.labels_sha256 not in {None, labels.hexdigest()}:
            raise DataError(
                f"{store.uri}: the labels are not those of the manifest; ingest the data set again"
            )


def _decoded(store: Blobs, part: Part, manifest: DatasetManifest) -> Iterator[tuple[memoryview, memoryview]]:
    """Yield pixels, as they lie in Arrow's memory, and labels, a row group or so at a time."""
    place = f"{store.uri}/{part.name}"
    data = store.get(part.name)
    if len(data) != part.bytes or hashlib.sha256(data).hexdigest() != part.sha256:
        found = f"{len(data)} of {part.bytes} bytes" if len(data) != part.bytes else "its sha256 differs"
        raise DataError(f"{place}: damaged ({found}); ingest the data set again")
    width = math.prod(manifest.shape[1:])
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["image", "label"])
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{place}: not a Parquet part ({str(error).splitlines()[0]}); ingest again"
        ) from error
    types = {field.name: field.type for field in table.schema}
    if types != {"image": pa.binary(width), "label": pa.int32()} or table.num_rows != part.images:
        raise DataError(
            f"{place}: {table.num_rows} rows of {types}, not what the manifest says; ingest again"
        )
    for rows in table.to_batches():
        image, label = rows.column(0), rows.column(1)
        if image.null_count:
            raise DataError(f"{place}: has images without pixels; ingest the data set again")
        pixels = memoryview(image.buffers()[1])[image.offset * width : (image.offset + len(image)) * width]
        yield pixels, label.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i4").data


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name once it is whole; where another process was faster, its file stays."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".decoding-", delete=False) as file:
        try:
            yield file
            file.flush()
            if not _is_whole(path, file.tell()):
                Path(file.name).replace(path)
        finally:
            Path(file.name).unlink(missing_ok=True)
