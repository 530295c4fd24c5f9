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
