"""Data sets: bit-exact, whole or absent, damage found before it reaches a model."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jebm.data.dataset import default_cache_directory, load_images
from jebm.data.manifest import MANIFEST, read_manifest
from jebm.data.shards import write_dataset
from jebm.data.source import Batch, Source, source_from_arrays
from jebm.errors import DataError, StoreError
from jebm.store.storage import ObjectInfo, Store, open_store

REPOSITORY = Path(__file__).resolve().parents[2]


def random_images(*shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def random_source(images: int = 2500, *, labelled: bool = True) -> Source:
    labels = np.arange(images) % 10 if labelled else None
    return source_from_arrays(random_images(images, 6, 5, 3), labels, name="random")


def failing_source(images: int) -> Source:
    """Return a source that breaks after some images, as a truncated file does."""
    source = random_source(images)

    def read() -> Iterator[Batch]:
        yield from source.read()
        raise OSError("read error")

    return replace(source, read=read, images=None)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "set") if request.param == "local" else f"memory://{tmp_path.name}/set")


def keys(store: Store) -> set[str]:
    return {info.key for info in store.list()}


# --- writing and reading


@pytest.mark.parametrize("images_per_part", [700, 1024, 8192])
def test_images_and_labels_come_back_bit_for_bit(store: Store, tmp_path: Path, images_per_part: int) -> None:
    source = random_source()
    counts: list[int] = []
    manifest = write_dataset(source, store, images_per_part=images_per_part, progress=counts.append)
    assert counts == [*range(images_per_part, 2500, images_per_part), 2500]
    assert read_manifest(store) == manifest
    loaded = load_images(store, tmp_path / "cache")
    np.testing.assert_array_equal(loaded.images_NHWC, random_images(2500, 6, 5, 3))
    np.testing.assert_array_equal(loaded.labels_N, np.arange(2500) % 10)
    assert not loaded.images_NHWC.flags.writeable
    assert manifest.sha256 == hashlib.sha256(random_images(2500, 6, 5, 3).tobytes()).hexdigest()


def test_parts_are_plain_parquet_that_others_can_read(tmp_path: Path) -> None:
    manifest = write_dataset(random_source(), open_store(str(tmp_path)), images_per_part=1500)
    assert [part.images for part in manifest.parts] == [1500, 1000]
    file = pq.ParquetFile(tmp_path / manifest.parts[0].name)
    assert file.schema_arrow.field("image").type == pa.binary(6 * 5 * 3)
    assert file.schema_arrow.field("label").type == pa.int32()
    assert file.metadata.row_group(0).num_rows == 1000
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert "RLE_DICTIONARY" not in file.metadata.row_group(0).column(0).encodings
    metadata = file.schema_arrow.metadata
    assert (metadata[b"height"], metadata[b"width"], metadata[b"channels"]) == (b"6", b"5", b"3")
    images = random_images(2500, 6, 5, 3)
    assert metadata[b"sha256"].decode() == hashlib.sha256(images[:1500].tobytes()).hexdigest()
    assert file.read().column("image")[7].as_py() == images[7].tobytes()


def test_the_pixel_hash_does_not_depend_on_the_cut(tmp_path: Path) -> None:
    hashes = {
        write_dataset(random_source(), open_store(str(tmp_path / str(size))), images_per_part=size).sha256
        for size in (300, 1000, 4000)
    }
    assert len(hashes) == 1


def test_missing_labels_stay_missing(tmp_path: Path) -> None:
    bare, some = open_store(str(tmp_path / "bare")), open_store(str(tmp_path / "some"))
    write_dataset(random_source(labelled=False), bare)
    labels = np.where(np.arange(2500) % 3 == 0, -1, 4)
    write_dataset(source_from_arrays(random_images(2500, 6, 5, 3), labels, name="some"), some)
    # The same pixels: one file in the cache, and the labels of neither in the way of the other.
    assert load_images(bare, tmp_path / "cache").labels_N is None
    np.testing.assert_array_equal(load_images(some, tmp_path / "cache").labels_N, labels)
    assert load_images(bare, tmp_path / "cache").labels_N is None
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JEBM_CACHE", str(tmp_path))
    assert default_cache_directory() == tmp_path
    monkeypatch.delenv("JEBM_CACHE")
    assert default_cache_directory() == Path.home() / ".cache" / "jebm" / "data"


# --- whole or absent


def test_a_source_that_breaks_leaves_nothing(store: Store) -> None:
    with pytest.raises(DataError, match="random: cannot be read"):
        write_dataset(failing_source(2500), store, images_per_part=1000)
    assert keys(store) == set()
    with pytest.raises(DataError, match="no images"):
        write_dataset(source_from_arrays(random_images(0, 4, 4, 1), name="empty"), store)
    assert keys(store) == set()


def test_a_data_set_is_not_overwritten_unasked(store: Store) -> None:
    first = write_dataset(random_source(), store)
    with pytest.raises(DataError, match="exists"):
        write_dataset(random_source(100), store)
    assert read_manifest(store) == first


def test_overwriting_leaves_only_the_new_data_set(store: Store, tmp_path: Path) -> None:
    write_dataset(random_source(), store, images_per_part=500)
    store.put("notes.txt", b"not ours")
    second = write_dataset(random_source(100), store, overwrite=True)
    assert keys(store) == {MANIFEST, "notes.txt", second.parts[0].name}
    assert len(load_images(store, tmp_path / "cache").images_NHWC) == 100


def test_overwriting_that_breaks_keeps_the_old_data_set(store: Store, tmp_path: Path) -> None:
    write_dataset(random_source(), store, images_per_part=500)
    before = keys(store)
    with pytest.raises(DataError):
        write_dataset(failing_source(1200), store, images_per_part=500, overwrite=True)
    assert keys(store) == before
    assert len(load_images(store, tmp_path / "cache").images_NHWC) == 2500


class FullStore:
    """A store with room for so many objects, and no more."""

    def __init__(self, store: Store, room: int) -> None:
        self.store, self.room = store, room
        self.uri = store.uri

    def get(self, key: str) -> bytes:
        return self.store.get(key)

    def put(self, key: str, data: bytes) -> None:
        if self.room == 0:
            raise StoreError(f"{self.uri}/{key}: no space left")
        self.room -= 1
        self.store.put(key, data)

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        return self.store.list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        self.store.delete(keys)


@pytest.mark.parametrize("room", [0, 2, 3])
def test_a_store_that_fills_up_is_left_empty(store: Store, room: int) -> None:
    with pytest.raises(StoreError, match="no space left"):
        write_dataset(random_source(), FullStore(store, room), images_per_part=1000)
    assert keys(store) == set()


# --- damage


def test_a_missing_data_set_says_how_to_make_one(store: Store) -> None:
    with pytest.raises(DataError, match=r"jebm ingest"):
        read_manifest(store)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "version 1"),
        ({"images": 7}, "images"),
        ({"height": True}, "height"),
        ({"width": 0}, "width"),
        ({"sha256": "../../etc/passwd"}, "sha256"),
        ({"parts": [{"name": "../x", "images": 2500, "bytes": 1, "sha256": "0" * 64}]}, "part"),
        ({"parts": "none"}, "parts"),
        ({"source": None}, "source"),
        ({"source": {"files": [{"name": 1}], "format": "", "transforms": []}}, r"source: files\[0\]"),
        ({"height": 10**9}, "height"),
        ({"width": 10**30}, "width"),
        ({"channels": 1e9}, "channels"),
        ({"height": 2**20, "width": 2**20}, "height, width and channels"),
        ({"images": 10**15}, "images"),
        ({"name": "\udcff"}, "surrogates not allowed"),
    ],
)
def test_a_wrong_field_of_the_manifest_is_named(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    store = open_store(str(tmp_path))
    write_dataset(random_source(), store)
    content = json.loads(store.get(MANIFEST)) | change
    store.put(MANIFEST, json.dumps(content).encode())
    with pytest.raises(DataError, match=reason) as caught:
        read_manifest(store)
    assert "\n" not in str(caught.value)
    assert MANIFEST in str(caught.value)


def test_a_part_too_large_for_its_images_is_not_even_fetched(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "set"))
    part = write_dataset(random_source(), store).parts[0]
    content = json.loads(store.get(MANIFEST))
    content["parts"][0]["bytes"] = 10**10
    store.put(MANIFEST, json.dumps(content).encode())
    with pytest.raises(DataError, match=f"bytes of {part.name}"):
        read_manifest(store)
    content["parts"][0]["bytes"] = part.bytes + 1
    store.put(MANIFEST, json.dumps(content).encode())
    with pytest.raises(DataError, match=f"{part.name}: damaged .{part.bytes} of {part.bytes + 1} bytes"):
        load_images(store, tmp_path / "cache")


def test_a_data_set_that_could_not_be_read_again_is_not_written(store: Store) -> None:
    source = source_from_arrays(random_images(10, 4, 4, 1), name="from a file named \udcff")
    with pytest.raises(DataError, match="cannot be described"):
        write_dataset(source, store)
    assert keys(store) == set()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000),
        *(b'{"format": NaN}', b'{"format": "", "format": ""}', b" " * (17 << 20)),
        b'{"version": ' + b"9" * 5_000 + b"}",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_a_manifest_that_is_none_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    store = open_store(str(tmp_path))
    store.put(MANIFEST, data)
    with pytest.raises(DataError, match="not a data set manifest") as caught:
        read_manifest(store)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("damage", ["flip", "truncate", "swap"])
def test_a_damaged_part_is_named_and_leaves_no_cache(tmp_path: Path, damage: str) -> None:
    store = open_store(str(tmp_path / "set"))
    parts = write_dataset(random_source(), store, images_per_part=1000).parts
    data = bytearray(store.get(parts[1].name))
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "truncate":
        del data[-1:]
    else:
        data = bytearray(store.get(parts[0].name))
    store.put(parts[1].name, bytes(data))
    with pytest.raises(DataError, match=parts[1].name) as caught:
        load_images(store, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_part_that_is_gone_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "set"))
    parts = write_dataset(random_source(), store, images_per_part=1000).parts
    store.delete([parts[2].name])
    with pytest.raises(StoreError, match=parts[2].name):
        load_images(store, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_parts_in_another_order_are_found_out(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "set"))
    write_dataset(random_source(), store, images_per_part=1000)
    content = json.loads(store.get(MANIFEST))
    content["parts"].reverse()
    store.put(MANIFEST, json.dumps(content).encode())
    with pytest.raises(DataError, match="not those of the manifest"):
        load_images(store, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_file_of_the_wrong_size_is_made_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "set"))
    manifest = write_dataset(random_source(), store)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / f"{manifest.sha256}.images.u8").write_bytes(b"cut off")
    np.testing.assert_array_equal(load_images(store, cache).images_NHWC, random_images(2500, 6, 5, 3))


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "set"))
    write_dataset(random_source(), store)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="JEBM_CACHE"):
        load_images(store, tmp_path / "file" / "cache")


# --- the subset that ships with the repository


@pytest.mark.parametrize(("split", "each"), [("train", 160), ("validation", 40), ("test", 40)])
def test_the_shipped_subset_is_whole_and_balanced(tmp_path: Path, split: str, each: int) -> None:
    place = REPOSITORY / "jobs" / "data" / "fashion_mnist_2000" / split
    loaded = load_images(open_store(str(place)), tmp_path)
    assert loaded.images_NHWC.shape == (10 * each, 28, 28, 1)
    assert hashlib.sha256(loaded.images_NHWC.tobytes()).hexdigest() == loaded.manifest.sha256
    assert loaded.labels_N is not None
    assert np.bincount(loaded.labels_N).tolist() == [each] * 10
    assert sum(path.stat().st_size for path in place.parent.rglob("*") if path.is_file()) < 1.2e6
