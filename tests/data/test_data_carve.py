"""Images held back for validation: which ones, and that nothing is lost or in both sets."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jebm.cli import run
from jebm.commands import ingest
from jebm.data.carve import carved, held_back
from jebm.data.dataset import ImageSet, load_images, shared_images
from jebm.data.source import Source, source_from_arrays
from jebm.store.storage import open_store


def numbered(images: int) -> Source:
    """Return a source whose images and labels hold their own position."""
    pixels = np.zeros((images, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(images) // 256, np.arange(images) % 256
    return source_from_arrays(pixels, np.arange(images), name="numbered")


def positions(source: Source) -> list[int]:
    found = []
    for batch in source.batches():
        assert batch.labels_N is not None
        place = batch.images_NHWC[:, 0, 0, 0].astype(int) * 256 + batch.images_NHWC[:, 0, 0, 1]
        assert place.tolist() == batch.labels_N.tolist()
        found += place.tolist()
    return found


def test_the_images_held_back_depend_on_their_positions_alone() -> None:
    assert np.flatnonzero(held_back(60_000, 5)).tolist() == [15127, 31429, 48204, 51542, 52131]
    # Whoever holds back more holds back these as well; each as likely as any other.
    few, many = held_back(10_000, 100), held_back(10_000, 5_000)
    assert (few.sum(), many.sum(), (few & many).sum()) == (100, 5_000, 100)
    halves = [int(many[:5_000].sum()), int(many[1::2].sum())]
    assert all(abs(count - 2_500) < 4 * 25 for count in halves)  # hypergeometric, sd 25
    digest = hashlib.sha256((7).to_bytes(8, "little")).digest()
    rank = sum(hashlib.sha256(i.to_bytes(8, "little")).digest() <= digest for i in range(1_000))
    assert held_back(1_000, rank)[7]
    assert not held_back(1_000, rank - 1)[7]


@pytest.mark.parametrize("known", [True, False])
def test_each_image_is_in_one_of_the_two_parts_with_its_label(known: bool) -> None:
    source = numbered(3_000)
    if not known:
        source = Source(**{**vars(source), "images": None})
    rest, held = carved(source, 500)
    assert (rest.images, held.images, rest.split, held.split) == (2_500, 500, "train", "validation")
    assert positions(held) == np.flatnonzero(held_back(3_000, 500)).tolist()
    assert sorted(positions(rest) + positions(held)) == list(range(3_000))
    assert positions(rest) == sorted(positions(rest))


def ingested(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """Run the command in this process; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["ingest", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run(ingest.main)
    out = capsys.readouterr()
    return ended.value.code or 0, out.out, out.err


def test_ingest_writes_both_parts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (400, 6, 6, 1), np.uint8)
    np.save(tmp_path / "images.npy", images)
    words = (tmp_path / "images.npy", "--validation", 100, "--output", tmp_path / "set/train")
    code, out, _ = ingested(monkeypatch, capsys, *words)
    assert (code, len(out.splitlines())) == (0, 2)

    def part(name: str) -> ImageSet:
        return load_images(open_store(str(tmp_path / "set" / name)), tmp_path / "cache")

    train, validation = part("train"), part("validation")
    is_held_N = held_back(400, 100)
    assert (train.images_NHWC == images[~is_held_N]).all()
    assert (validation.images_NHWC == images[is_held_N]).all()
    assert (train.manifest.split, validation.manifest.split) == ("train", "validation")
    assert shared_images(validation, train) == 0
    assert shared_images(validation, validation) == 100
    # The same again changes nothing; another number is another data set.
    code, out, _ = ingested(monkeypatch, capsys, *words)
    assert (code, out.count("already there")) == (0, 2)
    code, out, error = ingested(monkeypatch, capsys, *words[:2], 101, *words[3:])
    assert (code, out, error.count("\n"), "--overwrite" in error) == (2, "", 1, True)
    for wrong in ((*words[:2], 400, *words[3:]), (*words[:4], tmp_path / "set/validation")):
        code, out, error = ingested(monkeypatch, capsys, *wrong)
        assert (code, out, error.count("\n"), "validation" in error) == (2, "", 1, True)


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ("data/set/train", "data/set/validation"),
        ("s3://bucket/set/train/", "s3://bucket/set/validation"),
        ("data/pictures", "data/pictures-validation"),
        ("train", "validation"),
    ],
)
def test_where_the_images_held_back_go(output: str, place: str) -> None:
    assert ingest.validation_place(output) == place
