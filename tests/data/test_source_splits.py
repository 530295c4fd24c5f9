"""A source gives the part that is asked for, or a line with the parts that it has; never one set twice."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from source_files import random_images, refused, told, touch_images, write_idx

from jebm.data.readers import open_source


@pytest.mark.parametrize(
    ("train", "other", "asked"),
    [
        ("train", "test", "test"),
        ("Train", "TEST", "test"),
        ("training", "testing", "test"),
        ("train", "valid", "val"),
        ("train", "validation", "dev"),
        ("train", "dev", "validation"),
        ("train2017", "val2017", "val"),
        ("seg_train", "seg_test", "test"),
        ("training_set", "test_set", "test"),
        ("trainA", "testA", "test"),
    ],
)
@pytest.mark.parametrize("packed", ["", ".zip", ".tar.gz"])
def test_folders_of_splits_are_parts(tmp_path: Path, train: str, other: str, asked: str, packed: str) -> None:
    folder = tmp_path / "pets"
    names = [f"{train}/cat/1.png", f"{train}/dog/1.png", f"{train}/emu/1.png", f"{other}/dog/2.png"]
    touch_images(folder, *names)
    path = Path(f"{folder}{packed}")
    if packed == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.write(folder / name, f"pets/{name}")
    elif packed:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "./pets")
    # A class has one number in all parts, also where a part lacks others.
    values, labels, said = told(path, split=asked, labels="folders")
    assert (values, labels) == ([3], [1])
    assert f"3 of part {train}" in said
    values, labels, said = told(path, split="train", labels="folders")
    assert (values, labels) == ([0, 1, 2], [0, 1, 2])
    assert f"1 of part {other}" in said
    assert open_source(path, split=asked).description != open_source(path, split="train").description
    refused(path, train, other, "split")
    refused(path, train, other, "extra", split="extra")


def test_each_class_may_have_the_parts(tmp_path: Path) -> None:
    touch_images(tmp_path, "cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png")
    assert told(tmp_path, split="test", labels="folders")[:2] == ([1, 3], [0, 1])


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    vehicles = touch_images(tmp_path / "vehicles", "bus/1.png", "car/1.png", "train/1.png")
    assert told(vehicles, labels="folders")[:2] == ([0, 1, 2], [0, 1, 2])
    values, _, said = told(vehicles, split="test")
    assert len(values) == 3
    assert "split test is only a name here" in said
    # Words that hold the letters of a split are no splits.
    other = touch_images(tmp_path / "latest", "contest/1.png", "strain/1.png", "interval/1.png")
    assert len(told(other, split="val")[0]) == 3


def test_what_lies_beside_the_parts_is_told(tmp_path: Path) -> None:
    touch_images(tmp_path, "cover.png", "docs/figure.png", "train/1.png", "test/1.png")
    values, _, said = told(tmp_path, split="test")
    assert values == [3]
    assert "2 of no part" in said
    refused(tmp_path, "2 images beside", "test, train")


def test_two_folders_of_one_split_are_not_guessed_between(tmp_path: Path) -> None:
    touch_images(tmp_path, "trainA/1.png", "trainB/1.png", "testA/1.png", "testB/1.png")
    refused(tmp_path, "trainA and trainB", split="train")
    assert told(tmp_path, split="trainB")[0] == [1]


@pytest.mark.parametrize(
    "name", ["train", "train.npy", "x_train.npz", "train-images-idx3-ubyte", "train2017.zip"]
)
def test_a_source_that_is_called_train_is_no_test_set(tmp_path: Path, name: str) -> None:
    path, images = tmp_path / name, random_images(3, 4, 4)
    if path.suffix == ".npy":
        np.save(path, images)
    elif path.suffix == ".npz":
        np.savez(path, images=images)
    elif path.suffix == ".zip":
        touch_images(tmp_path / "in", "1.png")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "in" / "1.png", "1.png")
    elif "idx" in name:
        write_idx(path, images)
    else:
        touch_images(path, "1.png")
    refused(path, name, "train", "test", split="test")
    assert open_source(path).split == "train"
    assert open_source(path, split="training").split == "training"


def test_npz_has_the_parts_that_its_arrays_name(tmp_path: Path) -> None:
    images, labels = random_images(5, 4, 4), np.arange(5)
    path = tmp_path / "set.npz"
    np.savez(path, x_train=images, y_train=labels)
    refused(path, "x_train", "y_train", "train", "test", split="test")
    np.savez(path, xtest=images, ytest=labels)
    assert open_source(path).split == "test"
    np.savez(
        path,
        train_images=images,
        train_labels=labels[:, None],
        val_images=images[:2],
        val_labels=labels[:2, None],
    )
    assert told(path, split="validation")[1] == [0, 1]
    refused(path, "train_images", "val_images", "split")


def test_idx_folder_of_one_part_or_of_several_sets(tmp_path: Path) -> None:
    images = random_images(3, 4, 4)
    write_idx(tmp_path / "a-train-images-idx3-ubyte", images)
    refused(tmp_path, "train", "test", split="test")
    # The same set once more, in another form, is one set; another set is not.
    write_idx(tmp_path / "a-train-images.idx3-ubyte.gz", images)
    assert open_source(tmp_path, split="train").images == 3
    write_idx(tmp_path / "b-train-images-idx3-ubyte", images)
    refused(tmp_path, "a-train-images", "b-train-images", split="train")
