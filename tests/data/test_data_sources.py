"""Each reader against files of an independent writer: struct, scipy, pickle, Pillow, zipfile, pyarrow."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from jebm.data.sources import Source, open_source, source_from_arrays
from jebm.errors import ConfigError, DataError

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


# --- idx


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


# --- SVHN


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


# --- CIFAR-10


def write_cifar_rows(images_NHWC: Pixels, labels: Pixels) -> bytes:
    return b"".join(
        bytes([label]) + image.transpose(2, 0, 1).tobytes()
        for image, label in zip(images_NHWC, labels, strict=True)
    )


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


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


def python_2_pickle(images_NHWC: Pixels, labels: Pixels) -> bytes:
    """Spell out the opcodes of the official files, which Python 2 wrote."""
    pixels = images_NHWC.transpose(0, 3, 1, 2).tobytes()
    return (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K"
        + bytes([len(labels)])
        + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(pixels))
        + pixels
        + b"tbU\x06labels]("
        + b"".join(b"K" + bytes([label]) for label in labels)
        + b"eu."
    )


def test_cifar_pickles_of_python_2_and_3_are_read(tmp_path: Path) -> None:
    images, labels = random_images(30, 32, 32, 3), random_images(30) % 10
    rows = images[15:].transpose(0, 3, 1, 2).reshape(15, -1)
    python_3 = pickle.dumps({"data": rows, "labels": [int(label) for label in labels[15:]]}, protocol=2)
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "cifar-10-batches-py/data_batch_1", python_2_pickle(images[:15], labels[:15]))
        add(archive, "cifar-10-batches-py/data_batch_2", python_3)
    found, found_labels = read(open_source(path))
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(found_labels, labels)


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickle_is_refused_and_does_nothing(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "victim"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Hostile(victim)}, protocol))
    refused(folder, "data_batch_1", "mkdir")
    assert not victim.exists()
    # Names on the list, put to another use: an array class called, a codec that inflates.
    (folder / "data_batch_1").write_bytes(b"cnumpy\nndarray\n(I99999999\ntR.")
    refused(folder, "data_batch_1")
    (folder / "data_batch_1").write_bytes(b"c_codecs\nencode\n(X\x01\x00\x00\x00\xe9X\x03\x00\x00\x00hextR.")
    refused(folder, "data_batch_1")


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


# --- folders and archives of images


def write_images(folder: Path, images: dict[str, Pixels]) -> None:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(image))


def test_folder_zip_and_tar_give_the_same_images(tmp_path: Path) -> None:
    images = random_images(6, 9, 7, 3)
    names = ["cat/1.png", "cat/2.PNG", "cat/3.png", "dog/1.png", "dog/2.png", "dog/3.png"]
    folder = tmp_path / "pets"
    write_images(folder, dict(zip(names, images, strict=True)))
    (folder / "notes.txt").write_text("no image")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._1.png").write_bytes(b"no image")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as packed:
        for name in [*reversed(names), "notes.txt"]:
            packed.write(folder / name, name)
    with tarfile.open(tmp_path / "pets.tar.gz", "w:gz") as archive:
        for name in [*names, "notes.txt"]:
            archive.add(folder / name, name)
    for path in (folder, tmp_path / "pets.zip", tmp_path / "pets.tar.gz"):
        source = open_source(path, labels="folders")
        assert (source.name, source.images) == ("pets", 6)
        found, labels = read(source)
        np.testing.assert_array_equal(found, images)
        np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
        np.testing.assert_array_equal(read(open_source(path))[1], [-1] * 6)


def test_a_folder_is_known_by_names_and_content(tmp_path: Path) -> None:
    write_images(tmp_path / "a", {"1.png": random_images(4, 4), "2.png": random_images(4, 4)})
    first = open_source(tmp_path / "a").description
    assert open_source(tmp_path / "a").description == first
    (tmp_path / "a" / "2.png").rename(tmp_path / "a" / "3.png")
    assert open_source(tmp_path / "a").description != first


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    image = random_images(20, 10, 3)
    write_images(tmp_path, {"1.png": random_images(8, 8, 3), "2.png": image})
    refused(tmp_path, "2.png", "20x10", "8x8", "size")
    source = open_source(tmp_path, size=8)
    square = Image.fromarray(image[5:15])
    expected = np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(read(source)[0][1], expected)
    assert "8x8 (LANCZOS)" in source.description.transforms[0]


def test_images_of_different_colour_need_channels(tmp_path: Path) -> None:
    grey = random_images(8, 8)
    write_images(tmp_path, {"1.png": random_images(8, 8, 3), "2.png": grey})
    refused(tmp_path, "2.png", "channels")
    assert read(open_source(tmp_path, channels=3))[0].shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(read(open_source(tmp_path, channels=1))[0][1, ..., 0], grey)


def test_transparency_becomes_white_and_16_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 4), np.uint8), "RGBA").save(tmp_path / "1.png")
    np.testing.assert_array_equal(read(open_source(tmp_path))[0], np.full((1, 4, 4, 3), 255))
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "1.png")
    refused(tmp_path, "1.png", "8 bits")


def test_damaged_images_are_refused_by_name(tmp_path: Path) -> None:
    data = encoded(random_images(64, 64, 3))
    (tmp_path / "1.png").write_bytes(data)
    (tmp_path / "2.png").write_bytes(data[: len(data) // 2])
    refused(tmp_path, "2.png")
    (tmp_path / "2.png").write_bytes(b"hello")
    refused(tmp_path, "2.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no images")
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(broken, str(broken))


def test_image_that_inflates_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(65 << 20))
    refused(path, "1.png", "64 MiB")


# --- CelebA


def test_celeba_takes_the_official_split_and_the_named_crop(tmp_path: Path) -> None:
    images = random_images(4, 218, 178, 3)
    path = tmp_path / "img_align_celeba.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(images, 1):
            archive.writestr(f"img_align_celeba/{number:06d}.jpg", encoded(image, "JPEG"))
    refused(path, "list_eval_partition.txt")
    partition = tmp_path / "list_eval_partition.txt"
    partition.write_text("000001.jpg 0\n000002.jpg 1\n000003.jpg 0\n000004.jpg 2\n")
    source = open_source(path)
    assert (source.name, source.split, source.images) == ("celeba", "train", 2)
    assert source.description.transforms == (
        "centre crop 148x148",
        "centre square resized to 64x64 (LANCZOS)",
    )
    found, _ = read(source)
    for image, number in zip(found, (1, 3), strict=True):
        with zipfile.ZipFile(path) as archive:
            original = Image.open(io.BytesIO(archive.read(f"img_align_celeba/{number:06d}.jpg")))
        expected = original.crop((15, 35, 163, 183)).resize((64, 64), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image, np.asarray(expected))
    assert open_source(path, split="val").images == 1
    partition.write_text("000001.jpg 0\n000009.jpg 0\n")
    refused(path, "000009.jpg")
    partition.write_text("hello\n")
    refused(path, "list_eval_partition.txt")


# --- Parquet, NumPy


def test_hugging_face_parquet(tmp_path: Path) -> None:
    images = random_images(5, 6, 6)
    rows = [{"bytes": encoded(image), "path": f"{number}.png"} for number, image in enumerate(images)]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, part in (
        ("train-00000-of-00002", rows[:3]),
        ("train-00001-of-00002", rows[3:]),
        ("test-0", rows),
    ):
        labels = pa.array([7, None, 9, 1, 2][: len(part)], pa.int64())
        table = pa.table({"image": pa.array(part, image_type), "label": labels})
        pq.write_table(table, folder / f"{name}.parquet")
    found, found_labels = read(open_source(folder, split="train"))
    np.testing.assert_array_equal(found[..., 0], images)
    np.testing.assert_array_equal(found_labels, [7, -1, 9, 7, -1])
    assert open_source(folder / "test-0.parquet").images == 5
    refused(folder, "val", split="val")
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    refused(path, "no image column")
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, str(path))


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
    np.save(path, np.array([Hostile(tmp_path / "victim")], object), allow_pickle=True)
    refused(path, str(path), "not a plain NumPy array")
    assert not (tmp_path / "victim").exists()
    np.save(path, np.zeros((2, 4, 4)))
    refused(path, "uint8", "float64")
    np.save(path, np.zeros((2, 4, 4, 5), np.uint8))
    refused(path, "4x4x5")


# --- MNIST digits in JSON


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
        ('{"data": "' + "0" * 784 + '"}', "not a list of numbers"),
        ('{"data": [' + ",".join(["[0]"] * 784) + "]}", "not a list of numbers"),
        ('{"data": [' + ",".join(["true"] * 784) + "]}", "not a list of numbers"),
        ('{"data": [' + ",".join(["0"] * 783) + "]}", "783 numbers"),
        ('{"data": []}', "0 numbers"),
        ('{"data": [' + ",".join(["NaN"] * 784) + "]}", "outside 0 to 1"),
        ('{"data": [' + ",".join(["1e999"] * 784) + "]}", "outside 0 to 1"),
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


# --- all of them


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
        ({"limit": 0}, "limit"),
        ({"file_format": "svhn", "labels": "y"}, "labels"),
        ({"file_format": "idx", "partition": "p"}, "partition"),
    ):
        with pytest.raises(ConfigError, match=name):
            open_source(path, **options)
