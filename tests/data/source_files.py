"""Original files as independent writers make them, and what reading them gives."""

import gzip
import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from jebm.data.readers import open_source
from jebm.data.source import Source
from jebm.errors import DataError

Pixels = npt.NDArray[np.uint8]


def random_images(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def read(source: Source) -> tuple[Pixels, npt.NDArray[np.int32] | None]:
    batches = list(source.batches())
    images_NHWC = np.concatenate([batch.images_NHWC for batch in batches])
    assert images_NHWC.dtype == np.uint8
    assert images_NHWC.shape[1:] == (source.height, source.width, source.channels)
    assert source.images in {None, len(images_NHWC)}
    labels = [batch.labels_N for batch in batches if batch.labels_N is not None]
    return images_NHWC, np.concatenate(labels) if labels else None


def write_idx(path: Path, array: Pixels) -> bytes:
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return data


def encoded(image: Pixels, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def refused(path: Path, *names: str, **options: Any) -> str:
    """Return the message of the DataError that opening and reading gives; it names what it must."""
    with pytest.raises(DataError) as caught:
        read(open_source(path, **options))
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message
    return message


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_images(folder: Path, images: dict[str, Pixels]) -> None:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(image))


def touch_images(folder: Path, *names: str) -> Path:
    """Write a small picture of its own under each name."""
    for number, name in enumerate(names):
        write_images(folder, {name: np.full((4, 4, 3), number, np.uint8)})
    return folder


def told(path: Path, **options: Any) -> tuple[list[int], list[int], str]:
    """Return the grey value of each image (which `touch_images` numbers), its label, and what is said."""
    source = open_source(path, **options)
    images_NHWC, labels = read(source)
    return (
        images_NHWC[:, 0, 0, 0].tolist(),
        [] if labels is None else labels.tolist(),
        "; ".join(source.remarks),
    )
