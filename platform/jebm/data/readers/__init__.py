"""Readers of users' original files: idx, SVHN, CIFAR-10, CelebA, pictures, Parquet, NumPy."""

import difflib
import math
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, Unpack

import pyarrow.parquet as pq

from jebm.data.members import SafeTarInfo
from jebm.data.readers.celeba import open_celeba
from jebm.data.readers.cifar10 import is_batch, open_cifar10
from jebm.data.readers.factor_files import with_factors
from jebm.data.readers.idx import idx_images, open_idx
from jebm.data.readers.label_files import idx_file
from jebm.data.readers.mnist_digits import open_mnist_digits
from jebm.data.readers.numpy_files import open_npy
from jebm.data.readers.own import open_own
from jebm.data.readers.parquet import image_columns, open_parquet, parquet_files
from jebm.data.readers.pictures import open_images
from jebm.data.readers.svhn import open_svhn
from jebm.data.source import IMAGE_PIXELS_LIMIT, Request, Source, damage_is_named, leaving_out, limited
from jebm.errors import ConfigError, DataError
from jebm.paths import expanded

__all__ = ["FORMATS", "Options", "open_source"]

FORMATS = ("auto", "celeba", "cifar10", "idx", "images", "mnist-digits", "npy", "parquet", "svhn")


class Options(TypedDict, total=False):
    """Options for reading original files; None means the default."""

    split: str | None
    """train, test, …: which part to take if the source has parts, and its name."""
    labels: str | None
    """A label file (idx or .npy) for idx and npy; with "folders", an image's class is its folder."""
    partition: str | Path | None
    """CelebA's list_eval_partition.txt; by default searched for beside the archive."""
    size: int | None
    """Edge in pixels to which the centre square is resized (Pillow LANCZOS)."""
    channels: int | None
    """1 (grey) or 3 (RGB) to convert to; by default those of the first image."""
    factors: str | Path | None
    """A table of factors (JSON) for idx and npy: a row for each image."""
    without_label: int | None
    """Leave out the images of this class, so that it can serve as an anomaly."""
    limit: int | None
    """Take only the first images, this many (after `without_label`)."""
    init_args: Mapping[str, Any]
    """Arguments of a reader of the user's own."""


def open_source(path: str | Path, file_format: str = "auto", **options: Unpack[Options]) -> Source:
    """Open original files and return a `Source` with its shape and, if knowable, its image count.

    `path` is a file or folder, `file_format` one of `FORMATS` ("auto" looks at names and first bytes), or the
    path of a class of the user's own, a `jebm.parts.Reader`. `~` means the home folder in all paths.

    Raises ConfigError if an argument does not fit the format; DataError if a file is missing, damaged,
    hostile, or in another format.
    """
    path = _expanded(path, "source")
    labels, partition = options.get("labels"), options.get("partition")
    without_label, limit = options.get("without_label"), options.get("limit")
    if labels not in {None, "folders"}:
        labels = str(_expanded(str(labels), "labels"))
    request = Request(
        options.get("split"),
        labels,
        None if partition is None else _expanded(partition, "partition"),
        options.get("size"),
        options.get("channels"),
    )
    _check_options(file_format, request, limit)
    # Whatever a reader raises over the file's content becomes one DataError line.
    with damage_is_named(path):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give the path of the original files")
        file_format = _detected(path) if file_format == "auto" else file_format
        if labels is not None and file_format not in {"idx", "images", "npy"}:
            raise ConfigError(f"labels: format {file_format} brings its own; leave it out")
        if partition is not None and file_format != "celeba":
            raise ConfigError("partition: only format celeba has a partition file; leave it out")
        factors = options.get("factors")
        if factors is not None and file_format not in {"idx", "npy"}:
            raise ConfigError(f"factors: format {file_format} takes no table of factors; leave it out")
        if file_format in _OPENERS:
            source = _OPENERS[file_format](path, request)
        else:
            source = open_own(path, request, file_format, options.get("init_args", {}))
        source = source if factors is None else with_factors(source, _expanded(factors, "factors"))
        if not 1 <= source.height * source.width <= IMAGE_PIXELS_LIMIT or source.channels not in {1, 3}:
            shape = f"{source.height}x{source.width}x{source.channels}"
            raise DataError(f"{path}: images of {shape} pixels; convert to grey or RGB of at most 64 Mpixel")
    source = source if without_label is None else leaving_out(source, without_label)
    return source if limit is None else limited(source, limit)


def _expanded(path: str | Path, what: str) -> Path:
    if not str(path) or "://" in str(path):
        raise ConfigError(
            f"{what}: {str(path)!r} is no path of this machine; fetch the files, and give their path"
        )
    try:
        return expanded(path)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error


def _check_options(file_format: str, request: Request, limit: int | None) -> None:
    size, split = request.size, request.split
    if file_format not in FORMATS and "." not in file_format:
        close = difflib.get_close_matches(file_format, FORMATS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(FORMATS)}, or a class"
        raise ConfigError(f"format: {file_format!r} is unknown; {hint}")
    if request.channels not in {None, 1, 3}:
        raise ConfigError(f"channels: {request.channels} is not 1 (grey) or 3 (RGB)")
    for name, number in (("size", size), ("limit", limit)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}: {number} must be at least 1")
    if size is not None and size**2 > IMAGE_PIXELS_LIMIT:
        raise ConfigError(f"size: {size} is more than {math.isqrt(IMAGE_PIXELS_LIMIT)}, the largest edge")
    if split is not None and not (split and split.isprintable()):
        raise ConfigError(f"split: {split!r} is no name; give a word like train")


def _detected(path: Path) -> str:
    if path.is_dir():
        return _detected_folder(path)
    with path.open("rb") as file:
        head = file.read(8)
    # Magic numbers first, then names inside archives.
    if path.suffix == ".mat" or head.startswith((b"MATLAB", b"\x89HDF")):
        return "svhn"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\x93NUMPY") or path.suffix == ".npz":
        return "npy"
    if head.startswith(b"PK"):
        return "celeba" if "img_align_celeba" in path.name else "images"
    if head.startswith(b"\x1f\x8b"):
        with idx_file(path) as inflated:
            head = inflated.read(8)
    if re.match(rb"\0\0[\x08-\x0e][\x01-\x04]", head):
        return "idx"
    try:
        archive = tarfile.open(path, tarinfo=SafeTarInfo)  # noqa: SIM115  (closed below)
    except tarfile.TarError as error:
        known = ", ".join(FORMATS[1:])
        raise DataError(f"{path}: format not recognised; name it, one of {known}") from error
    with archive:
        names = [PurePosixPath(name).name for name in archive.getnames()]
    return "cifar10" if any(map(is_batch, names)) else "images"


def _detected_folder(path: Path) -> str:
    names = {entry.name for entry in path.iterdir()}
    if idx_images(path):
        return "idx"
    if any(is_batch(name) for name in names) or any(path.glob("cifar-10-batches-*/*")):
        return "cifar10"
    if {f"{digit}.json" for digit in range(10)} <= names:
        return "mnist-digits"
    # Picture folders may contain a Parquet table, and Parquet sets a picture.
    files, _ = parquet_files(path)
    return "parquet" if any(image_columns(pq.read_schema(path / file)) for file in files[:1]) else "images"


_OPENERS: dict[str, Callable[[Path, Request], Source]] = {
    "celeba": open_celeba,
    "cifar10": open_cifar10,
    "idx": open_idx,
    "images": open_images,
    "mnist-digits": open_mnist_digits,
    "npy": open_npy,
    "parquet": open_parquet,
    "svhn": open_svhn,
}
