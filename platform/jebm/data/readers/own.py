"""Original files of a format that only the user knows: a reader class of their own.

Shapes: H rows, W columns, C channels (1 grey, 3 RGB), N images of a batch.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jebm.classes import built, failure, full_path, loaded, module_of
from jebm.data.members import folder_description
from jebm.data.pixels import refitted
from jebm.data.source import (
    Batch,
    Reader,
    Request,
    Source,
    SourceDescription,
    SourceFile,
    checked_labels,
    described,
    images_per_batch,
)
from jebm.data.splits import named_split
from jebm.errors import DataError, JebmError
from jebm.untrusted import escaped

__all__ = ["open_own"]

_KEY = "format"


def open_own(path: Path, request: Request, class_path: str, init_args: Mapping[str, Any]) -> Source:
    """Open original files with a reader that the user's own command names, and so trusts.

    The reader's file counts as one of the source's files: with another reader, it is another data set.

    Raises:
        ConfigError: the class is no `Reader`, or its arguments do not fit.
        DataError: it fails, or an image or a label is not as `Reader.images` promises.
    """
    full = full_path(class_path, _KEY)
    kind = loaded(full, Reader, (module_of(full),), _KEY)  # type: ignore[type-abstract]
    reader = built(kind, (path,), init_args, f"{_KEY}.init_args")
    place = f"{path} by {kind.__name__}"

    def checked(items: Iterator[tuple[Any, Any]]) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
        try:
            for image, label in items:
                array = np.asarray(image)
                array = array[:, :, None] if array.ndim == 2 else array
                if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in {1, 3}:
                    raise DataError(
                        f"{place}: an image must be uint8 (H, W) or (H, W, 3), not {_shown(image)}"
                    )
                yield array, label
        except JebmError:
            raise
        except Exception as error:
            raise DataError(f"{place}: {failure(error)}") from error

    first = next(checked(reader.images()), None)
    if first is None:
        raise DataError(f"{place}: no images")
    shape = first[0].shape
    height, width, channels = shape

    def read() -> Iterator[Batch]:
        items = checked(reader.images())
        while chunk := list(islice(items, images_per_batch((height, width, channels)))):
            images, labels = zip(*chunk, strict=True)
            if strange := next((image.shape for image in images if image.shape != shape), None):
                raise DataError(f"{place}: an image of {strange}, and the first is {shape}")
            yield Batch(np.stack(images), checked_labels(labels, place))

    split, remarks = named_split(request.split, path)
    files = (_described(path), described(Path(inspect.getfile(kind))))
    arguments = (f"reader's arguments {json.dumps(dict(init_args), sort_keys=True)}",) if init_args else ()
    description = SourceDescription(files, full, arguments)
    name = escaped(path.resolve().name.split(".")[0])
    source = Source(name, split, height, width, channels, None, description, read, remarks)
    return refitted(source, request.size, request.channels)


def _described(path: Path) -> SourceFile:
    if not path.is_dir():
        return described(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return folder_description(path, ((str(file.relative_to(path)), file.read_bytes()) for file in files))


def _shown(image: object) -> str:
    return f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
