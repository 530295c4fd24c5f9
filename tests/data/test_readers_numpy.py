""".npy and .npz."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from source_files import random_images, read, refused

from jebm.data.readers import open_source


def test_npy_and_npz(tmp_path: Path) -> None:
    images, labels = random_images(11, 4, 5, 3), np.arange(11)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    found, found_labels = read(open_source(tmp_path / "images.npy", labels=str(tmp_path / "labels.npy")))
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(found_labels, labels)
    path = tmp_path / "set.npz"
    np.savez_compressed(path, x_train=images, y_train=labels, x_test=images[:4, ..., 0], y_test=labels[:4])
    refused(path, "x_train", "split")
    found, found_labels = read(open_source(path, split="test"))
    np.testing.assert_array_equal(found, images[:4, ..., :1])
    np.testing.assert_array_equal(found_labels, labels[:4])


def test_npy_of_objects_or_floats_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    np.save(path, np.array([{"an": "object"}], object), allow_pickle=True)
    refused(path, str(path), "not a plain NumPy array")
    np.save(path, np.zeros((2, 4, 4)))
    refused(path, "uint8", "float64")
    np.save(path, np.zeros((2, 4, 4, 5), np.uint8))
    refused(path, "4x4x5")
    np.save(path, random_images(2, 3, 4, 4))
    refused(path, "(2, 3, 4, 4)", "channels first", "transpose to (N, H, W, C)")
    np.savez(tmp_path / "set.npz", x=random_images(2, 3, 4, 4))
    refused(tmp_path / "set.npz", "channels first", size=4, channels=3)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_pieces(tmp_path: Path, order: Literal["C", "F"], save: Callable[..., None]) -> None:
    path, images = tmp_path / "set.npz", random_images(3000, 4, 5, 3)
    save(path, x=np.asarray(images, order=order), y=np.arange(3000))
    source = open_source(path, limit=2500)
    np.testing.assert_array_equal(read(source)[0], images[:2500])
    np.testing.assert_array_equal(read(open_source(path))[1], np.arange(3000))


def test_other_members_of_an_npz_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, images=random_images(3, 4, 4), masks=random_images(3, 4, 4), names=np.array([{}], object))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "hello")
    source = open_source(path)
    assert source.images == 3
    assert source.remarks == ("arrays seen and not used: masks, names, readme.txt",)


def test_an_array_with_something_after_it_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "trail.npy").open("wb") as file:
        for _ in range(2):
            np.save(file, random_images(3, 4, 4))
    refused(tmp_path / "trail.npy", "trail.npy", "longer than its header says")


@pytest.mark.parametrize("shape", ["(10**6, 10**6, 3)", "(1000000, 1000000, 3)", "(-1, 4, 4)", "(2, 4, 4"])
@pytest.mark.parametrize("packed", [True, False])
def test_headers_that_claim_too_much_are_refused(tmp_path: Path, shape: str, packed: bool) -> None:
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head
    path = tmp_path / ("x.npz" if packed else "x.npy")
    path.write_bytes(data)
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", data)
    refused(path, str(path))
