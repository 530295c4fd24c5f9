"""Parquet files like those of Hugging Face."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import encoded, random_images, read, refused, told, touch_images

from jebm.data.readers import open_source


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


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, images: int | list[int] = 3, column: str = "image", **columns: Any) -> Path:
    """Write pictures whose grey value is their number, and other columns as they are given."""
    numbers = range(images) if isinstance(images, int) else images
    rows = [{"bytes": encoded(np.full((4, 4, 3), n, np.uint8)), "path": f"{n}.png"} for n in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(rows, IMAGE), **columns}), path)
    return path


@pytest.mark.parametrize("first", [True, False])
def test_the_image_column_is_the_one_that_is_called_so(tmp_path: Path, first: bool) -> None:
    white = pa.array([{"bytes": encoded(np.full((4, 4, 3), 255, np.uint8)), "path": None}] * 3, IMAGE)
    path = write_parquet(tmp_path / "set.parquet", mask=white, label=[1, 2, 3])
    table = pq.read_table(path)
    pq.write_table(table if first else table.select(["label", "mask", "image"]), path)
    assert told(path) == ([0, 1, 2], [1, 2, 3], "columns seen and not used: mask")
    renamed = pq.read_table(path).rename_columns({"image": "left", "mask": "right"})
    pq.write_table(renamed, path)
    refused(path, str(path), "left", "right")


@pytest.mark.parametrize("name", ["width", "image_id", "fine_label", "digit"])
def test_no_column_is_labels_because_of_its_type(tmp_path: Path, name: str) -> None:
    path = write_parquet(tmp_path / "set.parquet", **{name: [5_000_000_001, 16, 16]})
    assert told(path) == ([0, 1, 2], [-1, -1, -1], f"columns seen and not used: {name}")


def test_a_column_that_hugging_face_declares_to_be_classes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet", fruit=[2, 0, 1], id=[7, 8, 9])
    features = {"image": {"_type": "Image"}, "fruit": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}
    said = json.dumps({"info": {"features": features}})
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": said}), path)
    assert told(path)[1:] == ([2, 0, 1], "columns seen and not used: id")
    for strange in ("[" * 100_000, "[1]", '{"info": 1}', '{"info": {"features": []}}', "\0"):
        pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": strange}), path)
        assert told(path)[1] == [-1, -1, -1]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([2.0, None, 1.0], [2, -1, 1]),
        (pa.array([2.0, float("nan"), 1.0]), [2, -1, 1]),
        ([True, False, None], [1, 0, -1]),
        (pa.array([3, None, 0], pa.uint8()), [3, -1, 0]),
        ([-1, 0, 1], [-1, 0, 1]),
        (["dog", "cat", "dog"], [1, 0, 1]),
        (pa.array(["b", "a", "b"], pa.large_string()), [1, 0, 1]),
        (["10", "9", None], [1, 0, -1]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1]),
        (pa.array([5, 6, 5]).dictionary_encode(), [5, 6, 5]),
    ],
    ids=str,
)
def test_labels_of_many_types(tmp_path: Path, values: Any, labels: list[int]) -> None:
    path = write_parquet(tmp_path / "set.parquet", label=values)
    assert told(path)[1:] == (labels, "")


@pytest.mark.parametrize(
    "values", [[[1], [2], [3]], pa.nulls(3), pa.array([1, 2, 3], pa.timestamp("s")), [{"a": 1}] * 3], ids=str
)
def test_labels_that_are_no_classes_are_told(tmp_path: Path, values: Any) -> None:
    path = write_parquet(tmp_path / "set.parquet", label=values)
    assert told(path)[1:] == ([-1, -1, -1], "columns seen and not used: label")


@pytest.mark.parametrize("values", [[-2, 0, 1], [0, 1, 2**31], [0, 1, 2**40], [0.5, 1.0, 2.0], [2**63, 0, 1]])
def test_labels_out_of_range_name_file_and_column(tmp_path: Path, values: list[Any]) -> None:
    column = pa.array(values, pa.uint64()) if 2**63 in values else values
    refused(write_parquet(tmp_path / "set.parquet", label=column), "set.parquet", "column label")


def test_columns_that_may_both_be_labels_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet", target=[1, 2, 3], **{"class": [1, 2, 3]})
    refused(path, "set.parquet", "class", "target")


def test_words_have_one_number_in_all_parts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", label=["cat", "dog", "emu"])
    write_parquet(tmp_path / "test-0.parquet", label=["dog", "emu", "dog"])
    assert told(tmp_path, split="test")[1] == [1, 2, 1]
    assert open_source(tmp_path).description.transforms == ("labels count the words cat, dog, emu",)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({}, ["label", "missing"]),
        ({"label": [0, 1, 2], "column": "img"}, ["image", "img"]),
        ({"label": ["a", "b", "c"]}, ["label", "words"]),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_files_of_a_set_that_differ_are_refused(
    tmp_path: Path, second: dict[str, Any], words: list[str], order: int
) -> None:
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"][::order]
    write_parquet(tmp_path / names[0], label=[0, 1, 2])
    write_parquet(tmp_path / names[1], **second)
    refused(tmp_path, "train-00001-of-00002.parquet", *words)


def test_files_may_differ_in_what_does_not_matter(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", label=pa.array([0, 1, 2], pa.int8()), width=[1, 1, 1])
    write_parquet(tmp_path / "b.parquet", label=[3.0, 4.0, None], note=["x", "y", "z"])
    write_parquet(tmp_path / "c.parquet", 0, label=pa.array([], pa.int64()))
    assert told(tmp_path)[:2] == ([0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, -1])


def test_parts_in_folders_and_names(tmp_path: Path) -> None:
    for part, numbers in (("train", [1, 2]), ("validation", [3]), ("test", [4])):
        write_parquet(tmp_path / "names" / "data" / f"{part}-00000-of-00001.parquet", numbers)
        write_parquet(tmp_path / "folders" / "default" / part / "0000.parquet", numbers)
    (tmp_path / "names" / "README.md").write_text("hello")
    for folder in ("names", "folders"):
        path = tmp_path / folder
        assert told(path)[0] == [1, 2]
        assert told(path, split="test")[0] == [4]
        assert told(path, split="val")[0] == told(path, split="dev")[0] == [3]
        refused(path, "train", "test", split="extra")
    assert told(tmp_path / "names")[2] == "passed over: 1 .md, 1 of part test, 1 of part val"


def test_missing_files_of_a_set_are_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00001-of-00004.parquet")
    assert "3 files of the set are not here" in told(tmp_path)[2]


def test_a_table_beside_pictures_does_not_hide_them(tmp_path: Path) -> None:
    touch_images(tmp_path, "1.png", "2.png")
    pq.write_table(pa.table({"file_name": ["1.png"], "label": [1]}), tmp_path / "metadata.parquet")
    values, _, said = told(tmp_path)
    assert values == [0, 1]
    assert "1 .parquet" in said


def test_small_row_groups_and_pages(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet", 200, label=[*range(200)])
    table = pq.read_table(path)
    for options in (
        {"row_group_size": 7},
        {"data_page_size": 100, "write_batch_size": 3},
        {"data_page_version": "2.0", "compression": "gzip"},
        {"use_dictionary": ["label"], "compression": "none"},
        {"column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY"}, "use_dictionary": False},
    ):
        pq.write_table(table, path, **options)
        assert told(path)[:2] == ([*range(200)], [*range(200)])
