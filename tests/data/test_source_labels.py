"""Labels: whole numbers from 0, out of what is called labels, in the order of numbers; or a word why not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from source_files import random_images, refused, told, touch_images, write_idx

from jebm.data.readers import open_source
from jebm.data.shards import write_dataset
from jebm.data.source import Batch, Source, SourceDescription, source_from_arrays
from jebm.errors import DataError
from jebm.store.memory import MemoryStore


def test_folders_that_are_numbers_are_labels_in_the_order_of_numbers(tmp_path: Path) -> None:
    touch_images(tmp_path, *(f"{number}/x.png" for number in (*range(12), "other")))
    values, labels, _ = told(tmp_path, labels="folders")
    assert values == labels


def test_the_class_is_above_folders_of_one_name(tmp_path: Path) -> None:
    folders = ["n02/images", "n01/images", "n10/images"]
    touch_images(tmp_path, *(f"{folder}/{folder[:3]}_0.png" for folder in folders))
    values, labels, _ = told(tmp_path, labels="folders")
    assert dict(zip(values, labels, strict=True)) == {0: 1, 1: 0, 2: 2}
    assert open_source(tmp_path, labels="folders").description.transforms == (
        "labels count the folders n01, n02, n10",
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat/left/1.png", "cat/right/1.png", "dog/left/1.png"], ["left", "cat", "dog"]),
        (["cat/1.png", "cat/more/2.png", "dog/1.png"], ["cat"]),
        (["1.png", "2.png"], ["class"]),
        (["1.png", "dog/2.png"], ["class"]),
    ],
)
def test_folders_that_may_be_the_class_or_not_are_refused(
    tmp_path: Path, names: list[str], words: list[str]
) -> None:
    refused(touch_images(tmp_path, *names), *words, labels="folders")


def test_a_part_without_classes_does_not_disturb_the_others(tmp_path: Path) -> None:
    touch_images(tmp_path, "train/b/images/1.png", "train/c/images/1.png", "test/images/1.png", "val/2.png")
    (tmp_path / "val" / "val_annotations.txt").write_text("2.png b\n")
    values, labels, said = told(tmp_path, split="train", labels="folders")
    assert (values, labels) == ([0, 1], [0, 1])
    assert "seen and not used as labels: val/val_annotations.txt" in said
    refused(tmp_path, "images", "b, c", split="test", labels="folders")
    refused(tmp_path, "class", split="val", labels="folders")


def test_folders_that_could_be_classes_are_told(tmp_path: Path) -> None:
    _, labels, said = told(touch_images(tmp_path, "cat/1.png", "dog/1.png"))
    assert labels == [-1, -1]
    assert "the images lie in 2 folders" in said


GOOD: list[Any] = [
    np.array([-1, 0, 2**31 - 1]),
    np.array([0.0, 1.0, np.nan]),
    np.array([True, False, True]),
    np.array([[1], [2], [3]], np.uint64),
]
BAD: list[Any] = [
    np.array([-2, 0, 1]),
    np.array([0, 1, 2**31]),
    np.array([0, 1, 2**63], np.uint64),
    np.array([0.5, 1, 2]),
    np.array([0, 1, np.inf]),
    np.array(["a", "b", "c"]),
    np.array([1j, 0, 0]),
]


@pytest.mark.parametrize("labels", GOOD, ids=repr)
def test_whole_numbers_of_any_type_are_labels(tmp_path: Path, labels: Any) -> None:
    expected = np.nan_to_num(labels.astype(np.float64), nan=-1).reshape(-1)
    np.save(tmp_path / "l.npy", labels)
    np.save(tmp_path / "images.npy", random_images(3, 4, 4))
    np.savez(tmp_path / "set.npz", x=random_images(3, 4, 4), y=labels)
    assert told(tmp_path / "images.npy", labels=str(tmp_path / "l.npy"))[1] == expected.tolist()
    assert told(tmp_path / "set.npz")[1] == expected.tolist()


@pytest.mark.parametrize("labels", BAD, ids=repr)
def test_what_is_no_label_is_refused_before_anything_is_written(tmp_path: Path, labels: Any) -> None:
    np.save(tmp_path / "l.npy", labels)
    np.save(tmp_path / "images.npy", random_images(3, 4, 4))
    refused(tmp_path / "images.npy", "l.npy", "label", labels=str(tmp_path / "l.npy"))
    if labels.dtype.kind in "iu":
        with pytest.raises(DataError, match="label"):
            list(source_from_arrays(random_images(3, 4, 4, 1), labels, name="x").batches())


def test_no_source_of_ones_own_can_write_what_cannot_be_read() -> None:
    batch = Batch(random_images(2, 4, 4, 1), np.array([-2, 0], np.int32))
    source = Source("own", "train", 4, 4, 1, 2, SourceDescription((), "own"), lambda: iter([batch]))
    store = MemoryStore("own", "labels")
    with pytest.raises(DataError, match="own: label -2"):
        write_dataset(source, store)
    assert list(store.list("")) == []


def test_svhn_labels_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    scipy.io.savemat(path, {"X": random_images(4, 4, 3, 2), "y": np.array([1.5, 2.0])})
    refused(path, "label", "1.5")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train-images-idx3-ubyte.gz", "train-labels.idx1-ubyte.gz"),
        ("train-images.idx3-ubyte", "train-labels-idx1-ubyte.gz"),
        ("Train-Images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ],
)
def test_idx_labels_may_be_spelled_otherwise(tmp_path: Path, images: str, labels: str) -> None:
    write_idx(tmp_path / images, random_images(3, 4, 4))
    write_idx(tmp_path / labels, np.arange(3, dtype=np.uint8))
    assert told(tmp_path)[1:] == ([0, 1, 2], "")
    assert told(tmp_path / images)[1] == [0, 1, 2]


def test_idx_labels_of_wide_integers(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", random_images(3, 4, 4))
    head = bytes([0, 0, 12, 1, 0, 0, 0, 3])
    (tmp_path / "train-labels-idx1-int").write_bytes(head + np.array([5, -1, 300], ">i4").tobytes())
    label_file = str(tmp_path / "train-labels-idx1-int")
    assert told(tmp_path / "train-images-idx3-ubyte", labels=label_file)[1] == [5, -1, 300]


def test_label_files_that_are_not_used_are_told(tmp_path: Path) -> None:
    write_idx(tmp_path / "q-train-images-idx3-ubyte", random_images(3, 4, 4))
    (tmp_path / "q-train-labels-idx2-int").write_bytes(b"\0\0\x0c\x02")
    (tmp_path / "q-test-labels-idx2-int").write_bytes(b"\0\0\x0c\x02")
    assert told(tmp_path)[1:] == ([], "seen and not used as labels: q-train-labels-idx2-int")
    np.save(tmp_path / "images.npy", random_images(3, 4, 4))
    assert "q-train-labels-idx2-int" in told(tmp_path / "images.npy")[2]
    np.savez(tmp_path / "set.npz", x=random_images(3, 4, 4), ids=np.arange(3), y=np.arange(4))
    assert told(tmp_path / "set.npz")[1:] == ([], "arrays seen and not used: ids, y")


def test_folders_that_are_called_like_idx_files(tmp_path: Path) -> None:
    images, labels = random_images(3, 4, 4), np.arange(3, dtype=np.uint8)
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        (tmp_path / name).mkdir()
        write_idx(tmp_path / name / name, array)
    assert told(tmp_path)[1] == [0, 1, 2]  # what is in the folders, if there is nothing else
    write_idx(tmp_path / "train-images.idx3-ubyte", images[:2])
    write_idx(tmp_path / "train-labels.idx1-ubyte", labels[:2])
    assert told(tmp_path)[1] == [0, 1]
