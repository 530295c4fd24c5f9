"""Turn encoded images or arrays into pixels of one size and colour mode."""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from jebm.data.members import IMAGE_FORMATS
from jebm.data.source import (
    IMAGE_PIXELS_LIMIT,
    Batch,
    Request,
    Shape,
    Source,
    images_per_batch,
    what_failed,
)
from jebm.errors import DataError

__all__ = ["Encoded", "encoded_source", "fit_transforms", "fitted", "pixels", "refitted"]

_WAITING_BYTES = 64 << 20  # of encoded images waiting to be decoded
_DEEP = re.compile(r";(16|24|32)[BLNS]")  # Pillow's names for raw pixel layouts of over 8 bits
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Encoded:
    """One image as encoded file bytes."""

    name: str
    data: bytes
    label: int


def fitted(image: Image.Image, size: int | None, channels: int | None, crop: int | None) -> Image.Image:
    """Return the image in mode L or RGB: upright, on white, cropped, resized; DataError if impossible."""
    if image.width * image.height > IMAGE_PIXELS_LIMIT:
        raise DataError("more than 64 Mpixel")
    if image.mode in {"F", "I"} or image.mode.startswith("I;") or _is_deep(image):
        raise DataError(f"{image.mode} pixels of more than 8 bits; convert it to 8 bits first")
    image = _upright(image)
    # Colour: unchanged by default; transparent areas become white.
    grey = image.mode in {"1", "L", "LA"} if channels is None else channels == 1
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    image = image.convert("L" if grey else "RGB")
    # Size: resize the centre square, or the crop.
    edge = min(image.size) if crop is None else crop
    if edge > min(image.size):
        raise DataError(f"{image.height}x{image.width} is smaller than the crop of {crop}")
    if crop is not None or (size is not None and image.width != image.height):
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge))
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return image


def _is_deep(image: Image.Image) -> bool:
    """Return whether Pillow would drop bits: it opens 16-bit colour as 8-bit colour."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(argument, str) and _DEEP.search(argument) for argument in arguments):
            return True
    return False


def _upright(image: Image.Image) -> Image.Image:
    """Return the image rotated as its EXIF orientation says, ignoring all other fields."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # orientation unreadable: viewers do not rotate it either
        turn = None
    return image if turn is None else image.transpose(turn)


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return an image's pixels as (H, W, C)."""
    array = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array


def fit_transforms(size: int | None, channels: int | None) -> tuple[str, ...]:
    """Describe in words what `fitted` does to images."""
    resize = () if size is None else (f"centre square resized to {size}x{size} (LANCZOS)",)
    return resize + (() if channels is None else (f"converted to {'grey' if channels == 1 else 'RGB'}",))


def refitted(source: Source, size: int | None, channels: int | None) -> Source:
    """Resize or convert a source whose images are arrays."""
    if size in {None, source.height} and size in {None, source.width} and channels in {None, source.channels}:
        return source
    if source.channels not in {1, 3}:
        raise DataError(f"{source.name}: {source.channels} channels cannot be converted; 1 or 3 are needed")

    def read() -> Iterator[Batch]:
        for batch in source.read():
            arrays = batch.images_NHWC.squeeze(-1) if source.channels == 1 else batch.images_NHWC
            images = [pixels(fitted(Image.fromarray(array), size, channels, None)) for array in arrays]
            yield replace(batch, images_NHWC=np.stack(images))

    transforms = (*source.description.transforms, *fit_transforms(size, channels))
    return replace(
        source,
        height=size or source.height,
        width=size or source.width,
        channels=channels or source.channels,
        description=replace(source.description, transforms=transforms),
        read=read,
    )


def encoded_source(
    path: Path,
    request: Request,
    source: Callable[[Shape, Callable[[], Iterator[Batch]]], Source],
    encoded: Callable[[], Iterator[Encoded]],
    *,
    size: int | None,
    crop: int | None = None,
) -> Source:
    """Return a source of encoded images; the first one sets the shape that all must have."""

    def decoded(item: Encoded) -> npt.NDArray[np.uint8]:
        return _decoded(path, item, lambda image: fitted(image, size, request.channels, crop))

    first = next(encoded(), None)
    if first is None:
        raise DataError(f"{path}: no images in it; give a folder, zip or tar of PNG, JPEG, …")
    height, width, channels = shape = decoded(first).shape

    def batch(chunk: list[Encoded], images: Iterable[npt.NDArray[np.uint8]]) -> Batch:
        images_NHWC = np.empty((len(chunk), *shape), np.uint8)
        for row, (item, image_HWC) in enumerate(zip(chunk, images, strict=True)):
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
        return Batch(images_NHWC, np.array([item.label for item in chunk], np.int32))

    def read() -> Iterator[Batch]:
        # Pillow releases the GIL while it decodes.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for chunk in _chunks(encoded(), images_per_batch((height, width, channels))):
                yield batch(chunk, pool.map(decoded, chunk))

    return source((height, width, channels), read)


def _decoded(path: Path, item: Encoded, fit: Callable[[Image.Image], Image.Image]) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(item.data), formats=IMAGE_FORMATS) as image:
            return pixels(fit(image))
    except DataError as error:
        raise DataError(f"{path}: image {item.name} cannot be used: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: image {item.name} is none of {', '.join(IMAGE_FORMATS)}") from error
    except Exception as error:  # a decoder may raise anything on a damaged or hostile file
        raise DataError(f"{path}: image {item.name} {what_failed(error)}") from error


def _chunks(items: Iterator[Encoded], most: int) -> Iterator[list[Encoded]]:
    """Split into lists of at most `most` images and of a bounded size in memory."""
    chunk, waiting = list[Encoded](), 0
    for item in items:
        chunk.append(item)
        waiting += len(item.data)
        if len(chunk) == most or waiting >= _WAITING_BYTES:
            yield chunk
            chunk, waiting = [], 0
    if chunk:
        yield chunk
