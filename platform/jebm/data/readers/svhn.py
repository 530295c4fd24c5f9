"""SVHN: MATLAB v5 files."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jebm.data import matlab
from jebm.data.pixels import refitted
from jebm.data.source import (
    LABELS_LIMIT,
    Batch,
    Request,
    Source,
    SourceDescription,
    checked_labels,
    described,
    images_per_batch,
)
from jebm.data.splits import named_split
from jebm.errors import DataError

__all__ = ["open_svhn"]

_LABELS_AT_ONCE = 1 << 20


def open_svhn(path: Path, request: Request) -> Source:
    """Open a split; DataError if it is damaged, ConfigError if an option does not fit."""
    variables = matlab.variables(path)
    pixels, label_variable = variables.get("X"), variables.get("y")
    if pixels is None or label_variable is None:
        names = ", ".join(variables) or "none"
        raise DataError(f"{path}: variables X and y are needed, found {names}; fetch SVHN's train_32x32.mat")
    if len(pixels.dimensions) != 4 or pixels.dtype.str[1:] != "u1":
        raise DataError(f"{path}: X must be uint8 (H, W, C, N), not {pixels.dtype} {pixels.dimensions}")
    height, width, channels, images = pixels.dimensions
    if math.prod(label_variable.dimensions) != images or images > LABELS_LIMIT:
        raise DataError(f"{path}: y of shape {label_variable.dimensions} does not fit {images} images")
    pieces = matlab.values(path, label_variable, _LABELS_AT_ONCE)
    labels_N = np.concatenate([checked_labels(piece, path) for piece in pieces])
    if not 0 <= labels_N.min() <= labels_N.max() <= 10:
        raise DataError(f"{path}: labels from {labels_N.min()} to {labels_N.max()}, but SVHN's are 1 to 10")
    labels_N[labels_N == 10] = 0

    def read() -> Iterator[Batch]:
        # MATLAB's first index varies fastest, so each image is contiguous, as (C, W, H).
        step = images_per_batch((height, width, channels))
        start = 0
        for piece in matlab.values(path, pixels, step * height * width * channels):
            images_NCWH = piece.reshape(-1, channels, width, height)
            labels = labels_N[start : start + len(images_NCWH)]
            start += len(images_NCWH)
            yield Batch(np.ascontiguousarray(images_NCWH.transpose(0, 3, 2, 1)), labels)

    description = SourceDescription((described(path),), "svhn")
    split, remarks = named_split(request.split, path)
    source = Source("svhn", split, height, width, channels, images, description, read, remarks)
    return refitted(source, request.size, request.channels)
