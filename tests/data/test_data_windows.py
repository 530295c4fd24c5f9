"""A training set larger than the disk: a few parts at a time, and still a function of seed and step."""

import contextlib
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jebm.config import Config
from jebm.data.loader import Loader, to_uint8
from jebm.data.manifest import read_manifest
from jebm.data.shards import write_dataset
from jebm.data.source import source_from_arrays
from jebm.data.windows import Windows, parts_at_once
from jebm.errors import ConfigError, DataError, StoreError
from jebm.parser import override
from jebm.store.storage import Store, open_store

IMAGES, PER_PART, BATCH = 96, 10, 12  # nine parts of ten, and one of six
ROOM = 3 * 2 * PER_PART * 48 / 1e9  # three windows of two parts of images of 48 bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the place of a set whose image n begins with the pixel n."""
    images_NHWC = np.random.default_rng(0).integers(0, 256, (IMAGES, 4, 4, 3), np.uint8)
    images_NHWC[:, 0, 0, 0] = np.arange(IMAGES)
    place = str(tmp_path_factory.mktemp("windows") / "set")
    write_dataset(source_from_arrays(images_NHWC, name="n"), open_store(place), images_per_part=PER_PART)
    return place


@dataclass
class CountedStore:
    """A store that counts who asks for which part, and the bytes that then lie in the cache."""

    store: Store
    cache: Path
    asked: Counter[str] = dataclasses.field(default_factory=Counter)
    most_bytes: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "CountedStore":
        return self

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        self.asked[key] += 1
        self.look()
        self.store.read_into(key, offset, pieces, etag=etag)

    def look(self) -> None:
        used = 0
        for path in self.cache.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.suffix != ".lock" and path.is_file():
                    used += path.stat().st_size
        self.most_bytes = max(self.most_bytes, used)


def loaders(store: Any, cache: Path, ranks: int = 1, seed: int = 1, batch: int = BATCH) -> list[Loader]:
    cut = {"batch_size": batch, "seed": seed}
    place = (store, read_manifest(store))
    sets = [Windows(*place, cache_gb=ROOM, cache_directory=cache, **cut) for _ in range(ranks)]
    return [
        Loader(images, rank=rank, world_size=ranks, device="cpu", **cut) for rank, images in enumerate(sets)
    ]


def numbers(loader: Loader, steps: Sequence[int]) -> list[list[int]]:
    return [to_uint8(loader.batch(step))[:, 0, 0, 0].tolist() for step in steps]


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own(place: str, tmp_path: Path) -> None:
    store = open_store(place)
    (loader,), (other,) = loaders(store, tmp_path), loaders(store, tmp_path, seed=2)
    epochs = [numbers(loader, range(8 * epoch, 8 * epoch + 8)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(IMAGES))
    assert len({str(epoch) for epoch in [*epochs, numbers(other, range(8))]}) == 4
    # Shuffled within windows too: no batch is a run of neighbours.
    assert all(np.ptp(np.diff(batch)) > 0 for epoch in epochs for batch in epoch)


def test_any_step_can_be_the_first_with_any_number_of_workers(place: str, tmp_path: Path) -> None:
    store = open_store(place)
    (lived,) = loaders(store, tmp_path / "one")
    history = [lived.batch(step) for step in range(20)]
    for step in (19, 3, 8):
        ranks = loaders(store, tmp_path / "three", ranks=3)
        assert torch.equal(torch.cat([rank.batch(step) for rank in ranks]), history[step])


def test_the_cache_stays_within_its_bound_and_a_part_is_fetched_once_an_epoch(
    place: str, tmp_path: Path
) -> None:
    store = CountedStore(open_store(place), tmp_path)
    ahead, behind = loaders(store, tmp_path, ranks=2)
    for step in range(16):
        ahead.batch(step)
        if step:
            behind.batch(step - 1)
        store.look()
    assert 0 < store.most_bytes <= ROOM * 1e9
    # Two epochs; two windows are kept from one to the next, or decoded ahead for the third.
    assert len(store.asked) == 10
    assert sum(store.asked.values()) <= 2 * 10 + 2 * 2


@dataclass
class AwayStore:
    """A store that can be out of reach."""

    store: Store
    away: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def read_into(self, *words: Any, **more: Any) -> None:
        if self.away:
            raise StoreError("away")
        self.store.read_into(*words, **more)


def test_images_are_waited_for_only_where_all_ranks_prepare(place: str, tmp_path: Path) -> None:
    """And what could not be read ahead, while the storage was away, is read then."""
    store = AwayStore(open_store(place))
    ranks = loaders(store, tmp_path, ranks=3, batch=4)
    prepared = 0
    for step in range(60):
        (needs,) = {rank.needs_preparing(step) for rank in ranks}
        if needs:
            store.away = False
            for rank in ranks:
                rank.prepare(step)
            store.away = True
            prepared += 1
        for rank in ranks:
            rank.batch(step)
    assert 10 < prepared < 30


@pytest.mark.parametrize("batch_size", [BATCH, 10, 7, 30])
def test_a_cache_too_small_is_refused_with_the_least_that_will_do(place: str, batch_size: int) -> None:
    manifest = read_manifest(open_store(place))
    with pytest.raises(ConfigError, match=r"data\.cache_gb: .*set it to ≥ ") as caught:
        parts_at_once(manifest, 1e-9, batch_size)
    least = float(str(caught.value).rpartition("≥ ")[2])
    parts = parts_at_once(manifest, least, batch_size)
    assert sum(sorted(part.images for part in manifest.parts)[:parts]) >= batch_size


def test_a_damaged_part_is_named_when_its_window_comes(place: str, tmp_path: Path) -> None:
    damaged = open_store(str(tmp_path / "set"))
    for info in open_store(place).list():
        damaged.put(info.key, open_store(place).get(info.key))
    name = read_manifest(damaged).parts[4].name
    damaged.put(name, damaged.get(name)[::-1])
    (loader,) = loaders(damaged, tmp_path / "cache")
    with pytest.raises(DataError, match=f"{name}: damaged"):
        numbers(loader, range(8))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"data.cache_gb": 0.0, "data.held_out": "x"}, r"data\.cache_gb: must be positive"),
        ({"data.cache_gb": 1.0, "data.held_out": None}, r"data\.held_out: data\.cache_gb needs another"),
        (
            {"data.cache_gb": 1.0, "data.held_out": "x", "evaluation.every_steps": 9},
            r"evaluation\.every_steps: .*data\.cache_gb",
        ),
    ],
)
def test_what_needs_all_images_is_refused(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        override(Config(), keys)


def test_a_closed_set_waits_for_nobody(place: str, tmp_path: Path) -> None:
    """Neither for a storage that is away nor for another process's decoder: its process could not end."""

    @dataclass
    class Away(CountedStore):
        go_on: Callable[[], None] | None = None

        def patient(self, seconds: float, on_retry: Callable[[], None] | None = None) -> "Away":
            return dataclasses.replace(self, go_on=on_retry)

        def read_into(self, key: str, *_: object, **__: object) -> None:
            self.asked[key] += 1
            while self.go_on is not None:  # as a store that retries
                self.go_on()
                time.sleep(0.01)

    store = Away(open_store(place), tmp_path)
    manifest = read_manifest(store)
    cut = {"cache_gb": ROOM, "batch_size": BATCH, "seed": 1, "cache_directory": tmp_path}
    images, others, unused = (Windows(store, manifest, **cut) for _ in range(3))
    with ThreadPoolExecutor(2) as pool:  # the second waits for the first
        waiting = [pool.submit(windows.prepare, 0, 0, 1) for windows in (images, others)]
        deadline = time.monotonic() + 300
        while not store.asked:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for windows in (others, images):
            windows.close()
        for ended in waiting:
            assert isinstance(ended.exception(timeout=300), DataError)
    unused.close()
    for windows in (others, images, unused):
        with pytest.raises(DataError, match="closed"):
            windows.prepare(0, 0, 1)
