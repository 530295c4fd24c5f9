"""What all readers have in common."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from source_files import add, encoded, random_images, read, refused, write_idx

from jebm.data.readers import open_source
from jebm.data.source import source_from_arrays
from jebm.errors import ConfigError, DataError


def test_no_damage_gives_anything_but_one_line(tmp_path: Path) -> None:
    """Flip bytes of a small file of each kind: it is read or refused, never a traceback."""
    random, messages = np.random.default_rng(0), list[str]()
    images, labels = random_images(12, 8, 8), np.arange(12)
    scipy.io.savemat(tmp_path / "1.mat", {"X": random_images(8, 8, 3, 12), "y": labels % 10 + 1})
    write_idx(tmp_path / "images-idx3.gz", images)
    np.save(tmp_path / "1.npy", images)
    np.savez(tmp_path / "1.npz", x=images, y=labels)
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": encoded(image), "path": None} for image in images], image_type)
    pq.write_table(pa.table({"image": rows}), tmp_path / "1.parquet")
    with zipfile.ZipFile(tmp_path / "1.zip", "w") as packed, tarfile.open(tmp_path / "1.tar", "w") as tar:
        for kind in ("png", "jpeg", "bmp", "gif"):
            packed.writestr(f"1.{kind}", encoded(images[0], kind))
            add(tar, f"1.{kind}", encoded(images[0], kind))
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        assert open_source(path).images
        for _ in range(40):
            damaged = bytearray(whole)
            for place in random.integers(0, len(whole) if random.random() < 0.5 else 300, 3):
                damaged[place] = random.integers(256)
            path.write_bytes(damaged)
            try:
                read(open_source(path))
            except DataError as error:
                messages.append(str(error))
    assert len(messages) > 40
    assert not any("\n" in message for message in messages)


def test_limit_and_conversion_apply_to_arrays_too(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    images = random_images(3000, 4, 4)
    np.save(path, images)
    source = open_source(path, limit=1500)
    assert source.images == 1500
    np.testing.assert_array_equal(read(source)[0][..., 0], images[:1500])
    source = open_source(path, size=8, channels=3, limit=2)
    assert read(source)[0].shape == (2, 8, 8, 3)
    assert source.description.transforms == (
        "centre square resized to 8x8 (LANCZOS)",
        "converted to RGB",
        "first 2 images",
    )


def test_a_source_can_be_read_twice() -> None:
    images = random_images(10, 4, 4, 1)
    source = source_from_arrays(images, name="random")
    for _ in range(2):
        np.testing.assert_array_equal(read(source)[0], images)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    refused(path, str(path), "no such file")
    path.write_bytes(b"hello")
    refused(path, str(path), "not recognised")
    for options, name in (
        ({"file_format": "jpg"}, "format"),
        ({"channels": 2}, "channels"),
        ({"limit": 0}, "^limit: 0 must be at least 1"),
        ({"size": -1}, "^size: -1 must be at least 1"),
        ({"file_format": "svhn", "labels": "y"}, "labels"),
        ({"file_format": "idx", "partition": "p"}, "partition"),
    ):
        with pytest.raises(ConfigError, match=name):
            open_source(path, **options)
