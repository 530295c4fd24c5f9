"""Many checkpoints, and large ones: what a start and a listing cost."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.storage import open_store
from jebm.store.stream import PART_BYTES, StoredObject

KEYWORDS = {
    "attempt": 1,
    "state": {"position": 64},
    "config": {"run": {"seed": 7}},
    "metrics": {"loss": 1.0},
    "provenance": {"torch": torch.__version__},
    "world_size": 2,
    "parent": None,
}
MANY = 10_000
OVER_A_PAGE = 1_050


def fill(uri: str, count: int) -> Checkpoints:
    """Make checkpoints, by copying the objects of one."""
    store = open_store(uri)
    checkpoints = Checkpoints(store, "run")
    first = checkpoints.save({"w": torch.arange(10)}, step=1, **KEYWORDS)
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


def seconds_of(call, *arguments) -> tuple[float, object]:
    began = time.monotonic()
    answer = call(*arguments)
    return time.monotonic() - began, answer


def test_ten_thousand_checkpoints_are_no_burden():
    # In memory: what our side costs. The listings of a real server are counted below.
    checkpoints = fill(f"memory://{uuid.uuid4().hex}", MANY)
    took, latest = seconds_of(checkpoints.latest)
    assert (latest.step, took < 2) == (MANY, True)
    took, attempt = seconds_of(checkpoints.next_attempt)
    assert (attempt, took < 2) == (2, True)
    took, found = seconds_of(checkpoints.list, 20)
    assert ([item.step for item in found], took < 4) == (list(range(MANY, MANY - 20, -1)), True)
    took, pruned = seconds_of(checkpoints.prune, 3, 1, ())
    assert (pruned, took < 4) == ([], True)


def test_a_start_lists_folders_by_the_page_and_looks_into_the_newest_alone(s3_uri, proxy, monkeypatch, s3):
    checkpoints = fill(s3_uri, 3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environment()["AWS_ENDPOINT_URL"])
    store = open_store(s3_uri)  # past the proxy, which is slow
    with ThreadPoolExecutor(4) as pool:  # older ones, of which only the names matter
        keys = [f"run/checkpoints/step-{step:08d}-a0000/data/x" for step in range(OVER_A_PAGE)]
        list(pool.map(lambda key: store.put(key, b""), keys))
    proxy.seen.clear()
    took, attempt = seconds_of(checkpoints.next_attempt)
    assert (attempt, took < 2) == (2, True)
    listings = [line for line in proxy.seen if "list-type" in line]
    assert (len(listings), len(proxy.seen)) == (2, 2)
    assert "continuation-token" in listings[1]
    store.delete([f"run/checkpoints/step-{step:08d}-a0000/data/x" for step in range(4, OVER_A_PAGE)])
    proxy.seen.clear()
    took, latest = seconds_of(checkpoints.latest)
    assert (latest.step, took < 10) == (3, True)


def test_the_manifest_of_ten_gigabytes_is_read_in_a_blink():
    checkpoints = Checkpoints(open_store(f"memory://{uuid.uuid4().hex}"), "run")
    small = checkpoints.save({"w": torch.arange(10)}, step=1, **KEYWORDS)
    crc32 = tuple(number * 6_710_886 for number in range(640))
    large = StoredObject("data/r00000-00000000.safetensors", 640 * PART_BYTES, "etag", PART_BYTES, crc32)
    manifest = replace(small, objects=(large,))
    encoded = manifest.encode()
    assert len(encoded) < 10_000
    took = min(seconds_of(Manifest.decode, encoded)[0] for _ in range(5))
    assert Manifest.decode(encoded) == manifest
    assert took < 0.02
