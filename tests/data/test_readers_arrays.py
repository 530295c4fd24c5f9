"""idx, SVHN, CIFAR-10 and digits against files of an independent writer: struct, scipy, json."""

import gzip
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from source_files import Pixels, add, random_images, read, refused, write_idx

from jebm.data.readers import open_source
from jebm.errors import ConfigError


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder_gives_the_images_and_labels_of_the_split(tmp_path: Path, suffix: str) -> None:
    images, labels = random_images(2500, 5, 4), random_images(2500) % 10
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", labels)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images[:7] // 2)
    found, found_labels = read(open_source(tmp_path, split="train"))
    np.testing.assert_array_equal(found[..., 0], images)
    np.testing.assert_array_equal(found_labels, labels)
    source = open_source(tmp_path, split="test")
    assert (source.split, source.images) == ("test", 7)
    found, found_labels = read(source)
    np.testing.assert_array_equal(found[..., 0], images[:7] // 2)
    assert found_labels is None


def test_idx_file_finds_its_labels_or_takes_those_it_is_given(tmp_path: Path) -> None:
    images = random_images(6, 3, 3)
    path = tmp_path / "train-images.idx3-ubyte"
    write_idx(path, images)
    np.save(tmp_path / "mine.npy", np.arange(6))
    np.testing.assert_array_equal(read(open_source(path, labels=str(tmp_path / "mine.npy")))[1], np.arange(6))
    write_idx(tmp_path / "train-labels.idx1-ubyte", random_images(5))
    refused(path, "train-labels.idx1-ubyte", "5 labels", "6 images")


def test_idx_of_the_wrong_length_or_magic_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images-idx3-ubyte"
    data = write_idx(path, random_images(9, 4, 4))
    path.write_bytes(data[:-1])
    refused(path, str(path), "truncated")
    path.write_bytes(data + b"\0")
    refused(path, str(path), "longer")
    path.write_bytes(b"\0\0\x0d" + data[3:])
    refused(path, str(path), "not an idx file", file_format="idx")
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 2**31, 2**31))
    refused(path, str(path), "claims")
    packed = tmp_path / "images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(data)[:-20])
    refused(packed, packed.name)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("label_type", [np.uint8, np.float64])
def test_svhn_equals_what_scipy_wrote(tmp_path: Path, compressed: bool, label_type: type) -> None:
    path = tmp_path / "test_32x32.mat"
    pixels = random_images(32, 32, 3, 2100)
    labels = np.arange(2100)[:, None] % 10 + 1
    scipy.io.savemat(path, {"X": pixels, "y": labels.astype(label_type)}, do_compression=compressed)
    source = open_source(path)
    assert (source.name, source.split, source.images) == ("svhn", "test", 2100)
    images, found = read(source)
    np.testing.assert_array_equal(images, pixels.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(found, labels[:, 0] % 10)


def test_svhn_passes_over_other_variables(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    pixels = random_images(4, 6, 3, 8)
    content = {"note": "text", "cell": np.array([1, "a"], object), "X": pixels, "y": np.arange(1.0, 9)}
    scipy.io.savemat(path, content)
    images, labels = read(open_source(path))
    np.testing.assert_array_equal(images, pixels.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(labels, np.arange(1, 9))


def test_damaged_or_foreign_mat_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    content = {"X": random_images(8, 8, 3, 50), "y": np.ones(50)}
    scipy.io.savemat(path, content, do_compression=True)
    data = path.read_bytes()
    path.write_bytes(data[:2000])
    refused(path, str(path))
    path.write_bytes(data[:3000] + b"\xff" * 500 + data[3500:])
    refused(path, str(path))
    path.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n")
    refused(path, "v7.3", "-v7")
    path.write_bytes(b"x" * 500)
    refused(path, "not a MATLAB v5 file")
    scipy.io.savemat(path, {"X": content["X"]})
    refused(path, "X and y")
    scipy.io.savemat(path, {**content, "y": np.full(50, 11)})
    refused(path, "labels from 11")


def write_cifar_rows(images_NHWC: Pixels, labels: Pixels) -> bytes:
    return b"".join(
        bytes([label]) + image.transpose(2, 0, 1).tobytes()
        for image, label in zip(images_NHWC, labels, strict=True)
    )


def test_cifar_binary_archive_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    images, labels = random_images(60, 32, 32, 3), random_images(60) % 10
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for number in (3, 1, 2):  # the official one is not sorted either
            rows = slice(20 * number - 20, 20 * number)
            data = write_cifar_rows(images[rows], labels[rows])
            add(archive, f"cifar-10-batches-bin/data_batch_{number}.bin", data)
        add(archive, "cifar-10-batches-bin/test_batch.bin", write_cifar_rows(images[:5], labels[:5]))
        add(archive, "cifar-10-batches-bin/batches.meta.txt", b"airplane\n")
    source = open_source(path)
    assert (source.images, source.split) == (60, "train")
    found, found_labels = read(source)
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(found_labels, labels)
    np.testing.assert_array_equal(read(open_source(path, split="test"))[0], images[:5])
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "folder", filter="data")
    np.testing.assert_array_equal(read(open_source(tmp_path / "folder"))[0], images)
    with pytest.raises(ConfigError, match="train and test"):
        open_source(path, split="val")


def test_damaged_cifar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073 * 2 - 1))
    refused(tmp_path, "data_batch_1.bin", "3073")
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "data_batch_1.bin", random_images(3073 * 20).tobytes())
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-9000])
    refused(path, str(path))
    data[20_000] ^= 1  # random bytes are stored as they are: only the checksum at the very end can tell
    path.write_bytes(data)
    refused(path, str(path), "CRC")


def write_digits(folder: Path, images: int = 7) -> Pixels:
    """Ten files, pixels rounded as in the package; returns the images of digit d at [d]."""
    pixels = random_images(10, images, 28, 28)
    for digit in range(10):
        values = [round(value / 255, 3) for value in pixels[digit].reshape(-1).tolist()]
        (folder / f"{digit}.json").write_text(json.dumps({"data": values}))
    return pixels


def test_digits_come_in_turns_with_each_fifth_for_the_test(tmp_path: Path) -> None:
    pixels = write_digits(tmp_path, images=11)
    tests = [4, 9]
    for split, numbers in (
        ("test", tests),
        ("train", [n for n in range(11) if n not in tests]),
        ("all", [*range(11)]),
    ):
        source = open_source(tmp_path, split=split)
        assert (source.description.format, source.split) == ("mnist-digits", split)
        assert [file.name for file in source.description.files] == [f"{digit}.json" for digit in range(10)]
        found, labels = read(source)
        np.testing.assert_array_equal(found[..., 0], pixels[:, numbers].swapaxes(0, 1).reshape(-1, 28, 28))
        np.testing.assert_array_equal(labels, [*range(10)] * len(numbers))
    descriptions = {open_source(tmp_path, split=split).description for split in ("train", "test", "all")}
    assert len(descriptions) == 3
    assert open_source(tmp_path) == open_source(tmp_path, "mnist-digits", split="train")


def test_a_class_can_be_left_out(tmp_path: Path) -> None:
    pixels = write_digits(tmp_path)
    whole, source = open_source(tmp_path), open_source(tmp_path, without_label=4)
    found, labels = read(source)
    numbers = [n for n in range(7) if n != 4]
    np.testing.assert_array_equal(
        found[..., 0], np.delete(pixels, 4, 0)[:, numbers].swapaxes(0, 1).reshape(-1, 28, 28)
    )
    np.testing.assert_array_equal(labels, [0, 1, 2, 3, 5, 6, 7, 8, 9] * 6)
    assert source.description.transforms == (*whole.description.transforms, "without label 4")
    _, labels = read(open_source(tmp_path, without_label=0, limit=9))
    np.testing.assert_array_equal(labels, range(1, 10))
    refused(tmp_path, "no image has label 10", without_label=10)
    plain = tmp_path / "images.npy"
    np.save(plain, random_images(3, 4, 4))
    refused(plain, "no labels", without_label=4)


def test_what_is_done_to_digits_is_all_told(tmp_path: Path) -> None:
    write_digits(tmp_path)
    source = open_source(tmp_path, split="test", size=14, channels=3, without_label=1, limit=4)
    assert read(source)[0].shape == (4, 14, 14, 3)
    assert source.description.transforms == (
        "each fifth image of a digit",
        "digits in turns",
        "centre square resized to 14x14 (LANCZOS)",
        "converted to RGB",
        "without label 1",
        "first 4 images",
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not digits in JSON"),
        ("[" * 100_000, "not digits in JSON"),
        ("[1]", "not digits in JSON"),
        ('{"pixels": [0]}', "not digits in JSON"),
        ('{"data": "' + "0" * 784 + '"}', "not digits in JSON"),
        ('{"data": [' + ",".join(["[0]"] * 784) + "]}", "not a list of numbers"),
        ('{"data": [' + ",".join(["true"] * 784) + "]}", "not a list of numbers"),
        ('{"data": [' + ",".join(["0"] * 783) + "]}", "783 numbers"),
        ('{"data": []}', "0 numbers"),
        ('{"data": [' + ",".join(["NaN"] * 784) + "]}", "not digits in JSON"),
        ('{"data": [' + ",".join(["1e999"] * 784) + "]}", "not digits in JSON"),
        ('{"data": [' + ",".join(["-0.1"] * 784) + "]}", "outside 0 to 1"),
        ('{"data": [' + ",".join(["255"] * 784) + "]}", "outside 0 to 1"),
        ('{"data": [' + "9" * 400 + ",0]}", "not digits in JSON"),
        ('{"data": [' + "9" * 5000 + ",0]}", "not digits in JSON"),
        (b"\xff\xfe\xfd{", "not digits in JSON"),
        (b"0" * ((16 << 20) + 1), "too many"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_hostile_digits_are_refused(tmp_path: Path, content: str | bytes, reason: str) -> None:
    write_digits(tmp_path, images=1)
    (tmp_path / "3.json").write_bytes(content.encode() if isinstance(content, str) else content)
    refused(tmp_path, "3.json", reason)


def test_missing_digits_are_named(tmp_path: Path) -> None:
    write_digits(tmp_path, images=1)
    refused(tmp_path, "no images in part test", split="test")
    with pytest.raises(ConfigError, match="split"):
        open_source(tmp_path, split="val")
    (tmp_path / "7.json").unlink()
    refused(tmp_path, "7.json", "fetch-mnist-digits", file_format="mnist-digits")
