"""Many checkpoints, and large ones: what a start and a listing cost."""

import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from jebm.errors import CheckpointError
from jebm.store.checkpoint import Checkpoints, Facts, Manifest
from jebm.store.layout import StoredObject
from jebm.store.retrieve import open_run
from jebm.store.shares import Share
from jebm.store.storage import open_store
from jebm.store.stream import MOST_PARTS, PART_BYTES

FACTS = Facts(
    step=0,
    attempt=1,
    state={"position": 64},
    config={"run": {"seed": 7}},
    metrics={"loss": 1.0},
    provenance={"torch": torch.__version__},
    world_size=2,
    parent=None,
)
MANY = 1_000


def fill(uri: str, count: int) -> Checkpoints:
    """Make checkpoints, by copying the objects of one."""
    store = open_store(uri)
    checkpoints = Checkpoints(store, "run")
    first = checkpoints.save({"w": torch.arange(10)}, replace(FACTS, step=1))
    (stored,) = first.objects
    data = store.get(f"run/checkpoints/{first.name}/{stored.key}")

    def make(step: int) -> None:
        manifest = replace(first, step=step)
        folder = store.child(f"run/checkpoints/{manifest.name}")
        etag = folder.put(stored.key, data).etag
        folder.put("MANIFEST.json", replace(manifest, objects=(replace(stored, etag=etag),)).encode())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(2, count + 1)))
    return checkpoints


class Counted:
    """A store that counts what it is asked."""

    def __init__(self, store, asked: Counter | None = None) -> None:
        self._store = store
        self.asked: Counter[str] = Counter() if asked is None else asked

    def __getattr__(self, name):
        self.asked[name] += 1
        return getattr(self._store, name)

    def child(self, prefix: str) -> "Counted":
        return Counted(self._store.child(prefix), self.asked)

    def taken(self) -> dict[str, int]:
        """What was asked since the last time."""
        asked = dict(self.asked)
        self.asked.clear()
        return asked


def test_a_thousand_checkpoints_are_no_burden():
    uri = f"memory://{uuid.uuid4().hex}"
    fill(uri, MANY)
    store = Counted(open_store(uri))
    checkpoints = Checkpoints(store, "run")
    assert checkpoints.latest().step == MANY
    assert store.taken() == {"folders": 2, "list": 1, "read_into": 1}
    assert checkpoints.next_attempt() == 2
    assert store.taken() == {"folders": 2}
    assert [item.step for item in checkpoints.list(20)] == list(range(MANY, MANY - 20, -1))
    assert store.taken() == {"folders": 1, "list": 20, "read_into": 20}
    assert [item.step for item in checkpoints.list(step=7)] == [7]
    assert store.taken() == {"list": 1, "read_into": 1}
    assert checkpoints.find("step-00000007-a0001").step == 7
    assert store.taken() == {"list": 1, "read_into": 1}
    assert (checkpoints.find("step-00000007-a0002"), checkpoints.find("../run")) == (None, None)
    store.taken()
    assert checkpoints.prune(3, 1, ()) == []
    assert store.taken() == {"folders": 1, "list": 3, "read_into": 3}


def test_shares_of_many_ranks_cost_one_read_each_and_a_handful_of_listings():
    """Ranks that arrive one after the other do not cost a listing each."""
    uri, ranks = f"memory://{uuid.uuid4().hex}", 60
    store = Counted(open_store(uri))

    def save(rank: int, into) -> Manifest | None:
        share = Share(rank, ranks, "5ca1ab1e")
        facts = replace(FACTS, step=1, world_size=ranks)
        return Checkpoints(into, "run").save_share({"w": torch.arange(10)}, facts, share, 20)

    def trickle() -> None:
        for rank in range(1, ranks):
            time.sleep(0.02)
            save(rank, open_store(uri))

    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(trickle)
        manifest = save(0, store)
        others.result()
    seconds = time.monotonic() - began
    taken = store.taken()
    assert len(manifest.objects) == ranks
    # One that finds nothing new at once, six until the wait is 2 s long, and the one before the commit.
    assert taken["list"] <= 8 + seconds / 2, taken
    # The others' records, and the header of each object.
    assert taken["read_into"] <= 2 * ranks, taken
    assert "head" not in taken


def test_a_step_is_chosen_without_reading_the_others(s3_uri, proxy):
    fill(s3_uri, 12)
    run = open_run(f"{s3_uri}/run")
    proxy.seen.clear()
    assert run.choose(step=7).step == 7
    listing, manifest = proxy.seen
    assert "list-type" in listing
    assert "step-00000007-a" in listing
    assert manifest.endswith("step-00000007-a0001/MANIFEST.json")
    proxy.seen.clear()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 99; there are …, 3, 4, .*, 11, 12$"):
        run.choose(step=99)
    assert len([line for line in proxy.seen if "MANIFEST" in line]) == 11  # enough to name ten


def test_a_start_lists_folders_by_the_page_and_looks_into_the_newest_alone(s3_uri, proxy, monkeypatch):
    checkpoints = fill(s3_uri, 25)
    monkeypatch.setattr("jebm.store.s3_listing._PAGE", 10)
    proxy.seen.clear()
    assert checkpoints.next_attempt() == 2
    assert ["list-type" in line for line in proxy.seen] == [True] * 6  # twice: a bit of one may be flipped
    assert ["continuation-token" in line for line in proxy.seen] == [False, True, True] * 2
    proxy.seen.clear()
    assert checkpoints.latest().step == 25
    listings = [line for line in proxy.seen if "list-type" in line]
    assert (len(listings), len(proxy.seen)) == (2 * 3 + 1, 2 * 3 + 1 + 1)


def test_folders_that_a_server_still_names_are_passed_over(s3_uri):
    checkpoints = fill(s3_uri, 3)
    store = open_store(s3_uri)
    keys = [f"run/checkpoints/step-{step:08d}-a0000/data/x" for step in range(4, 24)]
    for key in keys:
        store.put(key, b"")
    store.delete(keys)
    assert checkpoints.latest().step == 3
    assert [found.step for found in checkpoints.list(2)] == [3, 2]


def test_the_manifest_of_ten_gigabytes_is_small():
    checkpoints = Checkpoints(open_store(f"memory://{uuid.uuid4().hex}"), "run")
    small = checkpoints.save({"w": torch.arange(10)}, replace(FACTS, step=1))
    crc32 = tuple(number * 6_710_886 for number in range(640))
    large = StoredObject("data/r00000-00000000.safetensors", 640 * PART_BYTES, "etag", PART_BYTES, crc32)
    manifest = replace(small, objects=(large,))
    assert len(manifest.encode()) < 10_000
    assert Manifest.decode(manifest.encode()) == manifest
    # And where a thousand ranks have written it, in as many parts as they may.
    most = MOST_PARTS // 1000
    shares = tuple(
        StoredObject(
            f"data/r{rank:05d}-00000000.safetensors", most << 30, "0" * 40, 1 << 30, (2**32 - 1,) * most
        )
        for rank in range(1000)
    )
    manifest = replace(small, objects=shares)
    assert Manifest.decode(manifest.encode()) == manifest
