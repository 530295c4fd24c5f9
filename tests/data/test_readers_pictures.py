"""Folders, zips and tars of pictures, and CelebA, which is one."""

import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import features
from source_files import add, encoded, random_images, read, refused, told, touch_images, write_images

from jebm.data.manifest import read_manifest
from jebm.data.readers import open_source
from jebm.data.shards import write_dataset
from jebm.store.memory import MemoryStore


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


def test_all_pictures_that_can_be_read_are_taken_and_others_counted(tmp_path: Path) -> None:
    kinds = {
        "A.JPG": "JPEG",
        "b.jfif": "JPEG",
        "c.jpe": "JPEG",
        "d.WebP": "WEBP",
        "e.Bmp": "BMP",
        "f.tiff": "TIFF",
    }
    kinds |= {"g.avif": "AVIF"} if features.check("avif") else {}
    for name, kind in kinds.items():
        (tmp_path / name).write_bytes(encoded(random_images(8, 8, 3), kind))
    for name in ("1.HEIC", "2.heic", "Thumbs.db", "noext", "list.txt", "labels.csv", ".a.png"):
        (tmp_path / name).write_bytes(b"hello")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._a.png").write_bytes(b"hello")
    (tmp_path / ".git").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    values, _, said = told(tmp_path)
    assert len(values) == len(kinds)
    assert said == (
        "passed over: 3 hidden, 2 .heic, 1 .csv, 1 .db, 1 .txt, 1 not regular, 1 without a suffix;"
        " seen and not used as labels: labels.csv"
    )


def test_links_lead_to_pictures_and_never_round_in_a_circle(tmp_path: Path) -> None:
    elsewhere = touch_images(tmp_path / "elsewhere", "cat/1.png", "cat/2.png", "one.png")
    (elsewhere / "cat" / "back").symlink_to(elsewhere)
    (elsewhere / "cat" / "source").symlink_to(tmp_path / "pets")
    pets = touch_images(tmp_path / "pets", "dog/1.png")
    for link, target in {
        "cat": elsewhere / "cat",
        "dog/linked.png": elsewhere / "one.png",
        "dog/again": pets / "dog",
        "dog/above": tmp_path,
        "dog/itself.png": "itself.png",
        "dog/broken.png": "nowhere.png",
    }.items():
        (pets / link).symlink_to(target)
    values, labels, said = told(pets, labels="folders")
    assert (values, labels) == ([0, 1, 0, 2], [0, 0, 1, 1])
    assert "2 linked to nothing" in said
    assert "linked to a folder that is read anyway" in said
    assert "linked to a folder above" in said


def test_links_in_archives_lead_to_members(tmp_path: Path) -> None:
    links = {  # in an order in which links come before what they lead to
        "b/3.png": ("../a/1.png", tarfile.SYMTYPE),
        "a/1.png": (encoded(np.full((4, 4), 1, np.uint8)), tarfile.REGTYPE),
        "b/1.png": ("a/1.png", tarfile.LNKTYPE),
        "c/4.png": ("../b/3.png", tarfile.SYMTYPE),
        "c/5.png": ("../.store/blob", tarfile.SYMTYPE),
        ".store/blob": (encoded(np.full((4, 4), 2, np.uint8)), tarfile.REGTYPE),
        "c/out.png": ("/etc/hostname", tarfile.SYMTYPE),
        "c/up.png": ("../../../x.png", tarfile.SYMTYPE),
        "c/round.png": ("round.png", tarfile.SYMTYPE),
        "c/dev.png": ("", tarfile.CHRTYPE),
    }
    with (
        tarfile.open(tmp_path / "pets.tar.gz", "w:gz") as tar,
        zipfile.ZipFile(tmp_path / "pets.zip", "w") as zipped,
    ):
        for name, (content, kind) in links.items():
            if isinstance(content, bytes):
                add(tar, name, content)
                zipped.writestr(name, content)
                continue
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, content
            tar.addfile(info)
            if kind == tarfile.SYMTYPE:
                entry = zipfile.ZipInfo(name)
                entry.create_system, entry.external_attr = 3, 0o120777 << 16
                zipped.writestr(entry, content)
    for path, hard in ((tmp_path / "pets.tar.gz", [1]), (tmp_path / "pets.zip", [])):
        values, labels, said = told(path, labels="folders")
        assert sorted(zip(labels, values, strict=True)) == sorted(
            [(0, 1), (1, 1), (2, 1), (2, 2), *((1, 1) for _ in hard)]
        )
        assert "3 linked to nothing in the archive" in said


def test_of_a_name_twice_in_an_archive_the_last_counts(tmp_path: Path) -> None:
    one, two = (encoded(np.full((4, 4), value, np.uint8)) for value in (1, 2))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "x.png", one)
        add(archive, "x.png", two)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("x.png", one)
        with pytest.warns(UserWarning, match="Duplicate"):
            packed.writestr("x.png", two)
    for path in (tmp_path / "a.tar", tmp_path / "a.zip"):
        assert told(path)[0] == [2]
        assert "1 replaced by a later copy" in told(path)[2]


def test_a_zip_with_the_separators_of_windows_keeps_its_classes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, name in enumerate(["cat\\1.png", "dog\\1.png"]):
            archive.writestr(name, encoded(np.full((4, 4), number, np.uint8)))
    assert told(tmp_path / "a.zip", labels="folders")[:2] == ([0, 1], [0, 1])


def test_names_that_are_not_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    touch_images(folder, "cat/1.png")
    (folder / "cat").rename(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b"))
    source = open_source(folder, labels="folders")
    assert read(source)[1] is not None
    manifest = write_dataset(source, store := MemoryStore("names", "odd"))
    assert read_manifest(store) == manifest
    assert manifest.name == "\\udce9"
    (next(folder.iterdir()) / "1.png").write_bytes(b"hello")
    refused(folder, "1.png")
