"""CelebA: the official archive and its lists."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_files import encoded, random_images, read, refused, told

from jebm.data.readers import open_source


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


ATTRIBUTES = ("5_o_Clock_Shadow", "Smiling")


@pytest.mark.parametrize("form", ["official", "kaggle"])
def test_attributes_become_factors(tmp_path: Path, form: str) -> None:
    path, partition = tmp_path / "img_align_celeba.zip", tmp_path / "list_eval_partition.txt"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            image = encoded(np.full((218, 178, 3), number, np.uint8))
            archive.writestr(f"img_align_celeba/00000{number}.png", image)
    partition.write_text("".join(f"00000{n}.png {n % 2}\n" for n in range(4)))
    answers = [[1, -1], [-1, -1], [-1, 1], [1, 1]]
    comma = form == "kaggle"
    lines = ["image_id," + ",".join(ATTRIBUTES)] if comma else ["4", " ".join(ATTRIBUTES) + " "]
    lines += [(", " if comma else "  ").join([f"00000{n}.png", *map(str, answers[n])]) for n in range(4)]
    attributes = tmp_path / f"list_attr_celeba.{'csv' if comma else 'txt'}"
    attributes.write_text("\n".join(lines))
    source = open_source(path)
    assert [(factor.name, factor.categories) for factor in source.factors] == [
        (name, ("no", "yes")) for name in ATTRIBUTES
    ]
    (batch,) = source.batches()
    assert batch.factors_NF is not None
    assert batch.factors_NF.tolist() == [[1, 0], [0, 1]]
    assert attributes.name not in " ".join(source.remarks)
    for broken, message in (
        (lines[:-2], "says nothing of 000002.png"),
        ([*lines[:-2], "000002.png 1 2"], "000002.png has no 2 answers"),
        (["Smiling Smiling"], "a name twice"),
        (["4", "../x"], "letters, digits and underscores"),
    ):
        attributes.write_text("\n".join(broken))
        refused(path, message)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("comma", [True, False])
def test_partitions_as_editors_save_them(tmp_path: Path, encoding: str, end: str, comma: bool) -> None:
    path, partition = tmp_path / "img_align_celeba.zip", tmp_path / "list_eval_partition.txt"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            image = encoded(np.full((218, 178, 3), number, np.uint8))
            archive.writestr(f"img_align_celeba/00000{number}.png", image)
    lines = [
        *(["image_id,partition"] if comma else []),
        *(f"00000{n}.png{',' if comma else '  '}{n}" for n in range(3)),
    ]
    partition.write_bytes(end.join([*lines, ""]).encode(encoding))
    assert [told(path, split=split)[0] for split in ("train", "valid", "test")] == [[0], [1], [2]]
    assert told(path)[2] == "passed over: 2 of other splits"
    partition.write_bytes((end.join([*lines, lines[-1]])).encode(encoding))
    refused(path, "000002.png twice")
    partition.write_bytes(b"\xff\xfe\xd8")
    refused(path, "not text")
