"""Factors from a table to memory: each image keeps its own, and a hostile table is refused in one line."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_files import refused

from jebm.data.carve import carved
from jebm.data.dataset import load_images
from jebm.data.manifest import MANIFEST, read_manifest
from jebm.data.readers import open_source
from jebm.data.shards import write_dataset
from jebm.errors import ConfigError, DataError
from jebm.store.storage import Store, open_store

IMAGES = 2_500
FACTORS = [
    {"name": "high", "categories": [f"h{i}" for i in range(10)]},
    {"name": "low_digit", "categories": [f"{i}" for i in range(256)]},
]


def table(**changes: Any) -> dict[str, Any]:
    """Return a table that tells each image's number, in base 256."""
    rows = [list(divmod(number, 256)) for number in range(IMAGES)]
    return {"format": "jebm-factors", "factors": FACTORS, "rows": rows} | changes


def written(folder: Path, content: dict[str, Any]) -> Path:
    """Write images that hold their number in two pixels, labels (number mod 7) and a table."""
    pixels = np.zeros((IMAGES, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(IMAGES) // 256, np.arange(IMAGES) % 256
    np.save(folder / "images.npy", pixels)
    np.save(folder / "labels.npy", np.arange(IMAGES) % 7)
    (folder / "factors.json").write_text(json.dumps(content))
    return folder / "images.npy"


def data_set(folder: Path, **options: Any) -> Store:
    source = open_source(
        written(folder, table()),
        labels=str(folder / "labels.npy"),
        factors=folder / "factors.json",
        **options,
    )
    store = open_store(str(folder / "set"))
    write_dataset(source, store, images_per_part=1_000)
    return store


@pytest.mark.parametrize("options", [{}, {"without_label": 3}, {"limit": 1_234}, {"channels": 1}])
def test_each_image_keeps_its_factors(tmp_path: Path, options: dict[str, Any]) -> None:
    images = load_images(data_set(tmp_path, **options), tmp_path / "cache")
    assert images.factors_NF is not None
    assert images.labels_N is not None
    numbers = images.factors_NF.astype(int) @ [256, 1]
    assert (numbers % 7 == images.labels_N).all()
    if "channels" not in options:
        assert (images.images_NHWC[:, 0, 0, :2] == images.factors_NF).all()
    count = {"without_label": math.ceil(IMAGES * 6 / 7), "limit": 1_234}
    assert len(numbers) == next((count[key] for key in options if key in count), IMAGES)
    assert [factor.name for factor in images.manifest.factors] == ["high", "low_digit"]
    again = load_images(open_store(str(tmp_path / "set")), tmp_path / "cache")  # from the cache
    assert again.factors_NF is not None
    assert (again.factors_NF == images.factors_NF).all()


def test_images_held_back_keep_their_factors(tmp_path: Path) -> None:
    source = open_source(written(tmp_path, table()), factors=tmp_path / "factors.json")
    for part in carved(source, 300):
        for batch in part.batches():
            assert batch.factors_NF is not None
            assert (batch.images_NHWC[:, 0, 0, :2] == batch.factors_NF).all()


def test_a_data_set_without_factors_is_written_and_read_as_before(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "set"))
    write_dataset(open_source(written(tmp_path, table())), store)
    assert load_images(store, tmp_path / "cache").factors_NF is None
    content = json.loads(store.get(MANIFEST))
    del content["factors"], content["factors_sha256"]  # as older versions wrote it
    store.put(MANIFEST, json.dumps(content).encode())
    assert read_manifest(store).factors == ()


HOSTILE_TABLES: list[tuple[dict[str, Any], str]] = [
    ({"format": "csv"}, "its format is not jebm-factors"),
    ({"factors": []}, "no factors, or no rows"),
    ({"rows": []}, "no factors, or no rows"),
    ({"rows": table()["rows"][:-1]}, "2499 rows of factors for 2500 images"),
    ({"rows": [[0]] * IMAGES}, r"rows\[0\] is no list of 2 whole numbers"),
    ({"rows": [[0, 1.0]] * IMAGES}, r"rows\[0\] is no list of 2 whole numbers"),
    ({"rows": [[0, True]] * IMAGES}, r"rows\[0\] is no list of 2 whole numbers"),
    ({"rows": [[10, 0]] * IMAGES}, "no category's index"),
    ({"rows": [[-1, 0]] * IMAGES}, "no category's index"),
    ({"rows": [[10**400, 0]] * IMAGES}, "no category's index"),
    (
        {"factors": [{"name": f"f{i}", "categories": ["a"]} for i in range(300)]},
        "factors are 300, most are 256",
    ),
    ({"factors": [FACTORS[0], FACTORS[0]]}, "a name twice"),
    ({"factors": [FACTORS[0], {"name": "label", "categories": ["a"]}]}, "called image or label"),
    ({"factors": [{"name": "../x", "categories": ["a"]}]}, "letters, digits and underscores"),
    ({"factors": [{"name": "x", "categories": []}]}, "0 categories"),
    ({"factors": [{"name": "x", "categories": ["a", "a"]}]}, "category twice"),
    ({"factors": [{"name": "x", "categories": ["\x1b[2J"]}]}, "no printable text"),
    ({"factors": [{"name": "x", "categories": [str(i) for i in range(10_001)]}]}, "10001 categories"),
    ({"factors": {"x": 1}}, "factors is a dict"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE_TABLES, ids=range(len(HOSTILE_TABLES)))
def test_a_hostile_table_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    found = refused(written(tmp_path, table(**changes)), factors=tmp_path / "factors.json")
    assert re.search(message, found)
    assert found.isprintable()


def test_only_formats_with_label_files_take_a_table(tmp_path: Path) -> None:
    written(tmp_path, table())
    with pytest.raises(ConfigError, match="format images takes no table"):
        open_source(tmp_path, "images", factors=tmp_path / "factors.json")


def edited(content: dict[str, Any], change: str) -> dict[str, Any]:
    if change == "fewer categories":
        content["factors"][0]["categories"].pop()
    elif change == "one factor less":
        content["factors"].pop()
    elif change == "other names":
        content["factors"].reverse()
    elif change == "no hash":
        content["factors_sha256"] = None
    elif change == "another hash":
        content["factors_sha256"] = "0" * 64
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fewer categories", "a high that is none of its 9 categories"),
        ("one factor less", "its columns are"),
        ("other names", "its columns are"),
        ("no hash", "do not fit together"),
        ("another hash", "the factors are not those of the manifest"),
    ],
)
def test_factors_that_do_not_fit_the_manifest_leave_no_file(
    tmp_path: Path, change: str, message: str
) -> None:
    store = data_set(tmp_path)
    content = edited(json.loads(store.get(MANIFEST)), change)
    store.put(MANIFEST, json.dumps(content).encode())
    with pytest.raises(DataError, match=message):
        load_images(store, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.*"))
