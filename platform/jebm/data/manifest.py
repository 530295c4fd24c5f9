"""The manifest of our data sets: the content of `dataset.json`, checked before use.

    part-00000-3f9a2c1e.parquet   image: fixed_size_binary[H·W·C], label: int32, and an int32 column for each
                                  factor; row groups of 1,000; zstd
    part-00001-…                  the second number is the start of the part's sha256
    dataset.json                  the manifest; the data set exists once this does

Shapes: N images, H rows, W columns, C channels.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from jebm.data.factors import Factor, factors_of
from jebm.data.source import SourceDescription, SourceFile
from jebm.errors import DataError
from jebm.store.protocol import Store
from jebm.untrusted import JsonObject, parsed_object, typed, whole_number

__all__ = [
    "MANIFEST",
    "PART_NAME",
    "DatasetManifest",
    "Part",
    "dataset_exists",
    "encode_manifest",
    "most_bytes",
    "read_manifest",
]

MANIFEST = "dataset.json"
PART_NAME = re.compile(r"part-\d{5}-[0-9a-f]{8}\.parquet")

_FORMAT, _VERSION = "jebm-dataset", 1
_MOST_MANIFEST_BYTES = 16 << 20  # about 80,000 parts
_MOST_PIXELS = 1 << 30  # per image, over all channels; Arrow's own limit is 2 GiB
_MOST_IMAGES = 1 << 32
_MOST_BYTES = 1 << 62
_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Part:
    """One Parquet object of a data set."""

    name: str
    images: int
    bytes: int
    sha256: str  # of the object


@dataclass(frozen=True)
class DatasetManifest:
    """What is known about a data set without reading its pixels."""

    name: str
    split: str
    height: int
    width: int
    channels: int
    images: int
    parts: tuple[Part, ...]
    sha256: str  # of all images' pixels in order, however split into parts
    labels_sha256: str | None  # of the labels as little-endian int32; None without labels
    source: SourceDescription
    created: str  # ISO time, UTC
    factors: tuple[Factor, ...] = ()
    factors_sha256: str | None = None  # of all rows of factors as little-endian int32; None without factors

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all images: (N, H, W, C)."""
        return self.images, self.height, self.width, self.channels

    @property
    def image_bytes(self) -> int:
        """Bytes of one image: H·W·C."""
        return self.height * self.width * self.channels


def dataset_exists(store: Store) -> bool:
    """Return whether a data set's manifest exists; StoreError if the store cannot be reached."""
    return _listed_bytes(store) is not None


def read_manifest(store: Store) -> DatasetManifest:
    """Return the checked manifest; DataError if it is missing or damaged."""
    listed = _listed_bytes(store)
    if listed is None:
        raise DataError(
            f"{store.uri}: no data set here; make one with jebm ingest SOURCE --output {store.uri}"
        )
    try:
        if listed > _MOST_MANIFEST_BYTES:  # do not even fetch it
            raise ValueError(f"more than {_MOST_MANIFEST_BYTES} bytes")
        return _from_json(parsed_object(store.get(MANIFEST), _MOST_MANIFEST_BYTES))
    except ValueError as error:
        raise DataError(
            f"{store.uri}/{MANIFEST}: not a data set manifest ({error}); ingest the data set again"
        ) from error


def _listed_bytes(store: Store) -> int | None:
    return next((info.size for info in store.list(MANIFEST) if info.key == MANIFEST), None)


def most_bytes(rows: int, width: int) -> int:
    """Return the size limit of `rows` values of `width` bytes in a file, with headers, inflated or not."""
    return 2 * rows * (width + 16) + (1 << 20)


def encode_manifest(manifest: DatasetManifest) -> bytes:
    """Return the manifest's bytes; DataError if they could not be read back."""
    content = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(manifest)}
    encoded = json.dumps(content, indent=1).encode()
    try:
        _from_json(parsed_object(encoded, _MOST_MANIFEST_BYTES))
    except ValueError as error:
        raise DataError(f"{manifest.name}: cannot be described as a data set ({error})") from error
    return encoded


def _from_json(content: JsonObject) -> DatasetManifest:
    """Return the manifest after checking every field; ValueError names a wrong one."""
    if typed(content, "format", str) != _FORMAT or typed(content, "version", int) != _VERSION:
        raise ValueError(f"its format is not {_FORMAT} version {_VERSION}")
    manifest = DatasetManifest(
        name=typed(content, "name", str),
        split=typed(content, "split", str),
        height=whole_number(content, "height", 1, _MOST_PIXELS),
        width=whole_number(content, "width", 1, _MOST_PIXELS),
        channels=whole_number(content, "channels", 1, _MOST_PIXELS),
        images=whole_number(content, "images", 1, _MOST_IMAGES),
        parts=tuple(_each(content, "parts", _part)),
        sha256=_sha256(content, "sha256"),
        labels_sha256=_optional_sha256(content, "labels_sha256"),
        source=_source(content),
        created=typed(content, "created", str),
        factors=factors_of(content) if "factors" in content else (),
        factors_sha256=_optional_sha256(content, "factors_sha256"),
    )
    if (manifest.factors_sha256 is None) != (not manifest.factors):
        raise ValueError("factors and factors_sha256 do not fit together")
    _check_parts(manifest)
    return manifest


def _check_parts(manifest: DatasetManifest) -> None:
    """Raise ValueError unless the parts' names have our form and their images add up to the set's."""
    if manifest.image_bytes > _MOST_PIXELS:
        raise ValueError(f"height, width and channels make an image of more than {_MOST_PIXELS} bytes")
    # Names become keys and file names, so only our own form may pass.
    names = {part.name for part in manifest.parts if PART_NAME.fullmatch(part.name)}
    if len(names) != len(manifest.parts):
        raise ValueError("parts has a name that is no part name, or one twice")
    if sum(part.images for part in manifest.parts) != manifest.images:
        raise ValueError("images is not the sum over the parts")
    for part in manifest.parts:
        numbers = len(manifest.factors) * most_bytes(part.images, 4)
        if part.bytes > most_bytes(part.images, manifest.image_bytes) + numbers:
            raise ValueError(f"bytes of {part.name} are more than its images can have")


def _part(content: JsonObject) -> Part:
    images = whole_number(content, "images", 1, _MOST_IMAGES)
    size = whole_number(content, "bytes", 1, _MOST_BYTES)
    return Part(typed(content, "name", str), images, size, _sha256(content, "sha256"))


def _source(content: JsonObject) -> SourceDescription:
    try:
        source = typed(content, "source", dict)
        transforms = typed(source, "transforms", list)
        if not all(isinstance(words, str) for words in transforms):
            raise ValueError("transforms has what is no text")
        files = tuple(_each(source, "files", _source_file))
        return SourceDescription(files, typed(source, "format", str), tuple(transforms))
    except ValueError as error:
        raise ValueError(f"source: {error}") from error


def _source_file(content: JsonObject) -> SourceFile:
    size = whole_number(content, "bytes", 0, _MOST_BYTES)
    return SourceFile(typed(content, "name", str), size, _sha256(content, "sha256"))


def _each(content: JsonObject, name: str, read: Callable[[JsonObject], _T]) -> Iterator[_T]:
    """Yield `read(object)` for each object of a list; its ValueErrors name the position."""
    for index, entry in enumerate(typed(content, name, list)):
        try:
            if not isinstance(entry, dict):
                raise ValueError("no JSON object")
            yield read(entry)
        except ValueError as error:
            raise ValueError(f"{name}[{index}]: {error}") from error


def _optional_sha256(content: JsonObject, name: str) -> str | None:
    return None if content.get(name) is None else _sha256(content, name)


def _sha256(content: JsonObject, name: str) -> str:
    value = typed(content, name, str)
    if not _SHA256.fullmatch(value):
        raise ValueError(f"{name} is not a sha256")
    return value
