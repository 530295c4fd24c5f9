"""A bit that is flipped between the store and us: what we read is right, or refused; it is never believed.

The server is the real one. The proxy flips bits in its answers, as bad memory in a switch does, behind the
checksums of TCP.
"""

import json
import random
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jebm.errors import CheckpointError
from jebm.store.checkpoint import Checkpoints, Facts, FencedError, Manifest
from jebm.store.mirror import download
from jebm.store.retrieve import open_run, read_tensors, tensor_table
from jebm.store.sealed import READS
from jebm.store.shares import Share
from jebm.store.storage import open_store

FACTS = Facts(
    step=0,
    attempt=1,
    state={"position": 64, "rate": 0.25},
    config={"energy": {"width": 100}, "run": {"name": "mine"}},
    metrics={"distortion": 168.347, "odd": float("nan")},
    provenance={"torch": "2.13"},
    world_size=2,
    parent=None,
)
TRIALS = 400


def save(checkpoints: Checkpoints, step: int, attempt: int = 1) -> Manifest:
    tensors = {"model.w": torch.arange(100.0) + step, "model.v": torch.arange(7)}
    return checkpoints.save(tensors, replace(FACTS, step=step, attempt=attempt))


def flipped(data: bytes, bit: int) -> bytes:
    spoiled = bytearray(data)
    spoiled[bit // 8] ^= 1 << bit % 8
    return bytes(spoiled)


def once(path_has: str, change: Callable[[bytes], bytes]) -> Callable[[str, bytes], bytes]:
    """Change the first answer to a request for such a path; the next ones are left alone."""
    left = [change]

    def rewrite(path: str, body: bytes) -> bytes:
        return left.pop()(body) if path_has in path and left else body

    return rewrite


# ── Manifests ───────────────────────────────────────────────────────────────────────────────────────────


def test_no_bit_of_a_manifest_can_be_another():
    manifest = save(Checkpoints(open_store(f"memory://{uuid.uuid4().hex}"), "run"), 1)
    encoded = manifest.encode()
    assert Manifest.decode(encoded) == manifest
    for bit in range(8 * len(encoded)):
        with pytest.raises(CheckpointError):
            Manifest.decode(flipped(encoded, bit))
    # Nor may a byte be added, taken away or written in another way that means the same to JSON.
    text = encoded.decode()
    for other in (
        f" {text}",
        f"{text}\n",
        text.replace(":", ": ", 1),
        text.replace('"run":', '"r\\u0075n":', 1),
    ):
        assert json.loads(other) == json.loads(text)
        with pytest.raises(CheckpointError, match="does not match the hash"):
            Manifest.decode(other.encode())


def test_a_manifest_with_a_flipped_bit_is_read_again(proxy, s3_uri):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    save(checkpoints, 1)
    second = save(checkpoints, 2)
    bits, dice = 8 * len(second.encode()), random.Random(7)
    for _ in range(TRIALS):
        proxy.rewrite = once("MANIFEST.json", lambda body: flipped(body, dice.randrange(bits)))
        found = checkpoints.find(second.name)
        assert (found.status, found.manifest) == ("committed", second)


def test_a_manifest_that_is_never_whole_is_none_and_never_a_new_run(proxy, s3_uri, caplog):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    first = save(checkpoints, 1)
    bits, dice = 8 * len(first.encode()), random.Random(7)
    proxy.rewrite = lambda path, body: flipped(body, dice.randrange(bits)) if "MANIFEST" in path else body
    for deep in (False, True):
        with pytest.raises(CheckpointError, match=f"none that can be read .{first.name}: .*verify .* --deep"):
            checkpoints.latest(deep=deep)
    proxy.rewrite = lambda _path, body: body
    second = save(checkpoints, 2)
    proxy.rewrite = lambda path, body: flipped(body, 99) if f"{second.name}/MANIFEST" in path else body
    assert checkpoints.latest() == first
    assert f"{second.name} is passed over: the manifest cannot be read" in caplog.text
    assert f"{first.name} is the newest that can be read" in caplog.text


def version_1(manifest: Manifest) -> bytes:
    """What was written before manifests had a hash."""
    content = json.loads(manifest.encode())
    del content["sha256"]
    for stored in content["objects"]:
        del stored["header_crc32"]
    return json.dumps(content | {"version": 1}, sort_keys=True, separators=(",", ":")).encode()


def test_a_manifest_without_a_hash_is_read_until_two_readings_agree(proxy, s3_uri, tmp_path, caplog):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    second = save(checkpoints, 2)
    old = version_1(second)
    open_store(s3_uri).put(f"run/checkpoints/{second.name}/MANIFEST.json", old)
    caplog.set_level("INFO", "jebm")
    found = checkpoints.latest()
    assert "has a manifest of version 1, without a hash" in caplog.text
    objects = tuple(replace(stored, header_crc32=None) for stored in second.objects)
    assert found == replace(second, version=1, objects=objects)
    into = {"model.w": torch.zeros(100), "model.v": torch.zeros(7, dtype=torch.int64)}
    checkpoints.load(found, into)
    assert torch.equal(into["model.w"], torch.arange(100.0) + 2)
    dice = random.Random(7)
    for _ in range(60):
        proxy.rewrite = once("MANIFEST.json", lambda body: flipped(body, dice.randrange(8 * len(old))))
        assert checkpoints.find(second.name).manifest == found
    # A download takes it as it is.
    download(open_run(f"{s3_uri}/run"), found, tmp_path, lambda *_: None)
    assert (tmp_path / f"run/checkpoints/{second.name}/MANIFEST.json").read_bytes() == old


def test_what_is_written_down_elsewhere_was_read_right(proxy, s3_uri, tmp_path):
    run = open_run(f"{s3_uri}/run")
    manifest = save(run.checkpoints, 1)
    for number, bit in enumerate((8 * 10, 8 * 200, 8 * 500 + 3)):
        proxy.rewrite = once("MANIFEST.json", lambda body, bit=bit: flipped(body, bit))
        target = tmp_path / str(number)
        download(run, manifest, target, lambda *_: None)
        assert open_run(str(target / "run")).checkpoints.latest() == manifest
    # The header of the data, too, from which names and shapes are taken. It begins behind 8 bytes.
    dice, expected = random.Random(7), tensor_table(run.folder(manifest.name), manifest)
    for number in range(40):
        proxy.rewrite = once(".safetensors", lambda body: flipped(body, dice.randrange(8 * 200)))
        if number % 4:
            assert tensor_table(run.folder(manifest.name), manifest) == expected
        else:
            found = read_tensors(run, manifest, expected)
            proxy.rewrite = lambda _path, body: body
            again = read_tensors(run, manifest, expected)
            assert all(found[name].equal(again[name]) for name in expected)


def test_our_own_manifest_is_recognised_though_it_comes_back_damaged(proxy, s3_uri):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    lost: list[str] = []

    def lose(method: str, path: str) -> str | None:
        if method == "PUT" and path.endswith("MANIFEST.json") and not lost:
            lost.append(path)
            return "lose"
        return None

    proxy.fault = lose
    proxy.rewrite = once(
        "MANIFEST.json", lambda body: body
    )  # the answer to the second PUT: it is there already
    damaged: list[bytes] = []

    def rewrite(path: str, body: bytes) -> bytes:
        if path.endswith("MANIFEST.json") and body.startswith(b"{") and len(damaged) < READS - 1:
            damaged.append(body)
            return flipped(body, 99)
        return body

    proxy.rewrite = rewrite
    manifest = save(checkpoints, 1)
    assert lost
    assert len(damaged) == READS - 1
    assert checkpoints.latest() == manifest
    with pytest.raises(FencedError, match="another writer"):
        save(checkpoints, 1)


# ── Listings ────────────────────────────────────────────────────────────────────────────────────────────

NEWEST = b"step-00000002-a0001"
LISTED = {  # each one bit apart
    "of a lower step": (NEWEST, b"step-00000000-a0001"),
    "of a higher step": (NEWEST, b"step-00000012-a0001"),
    "of another attempt": (NEWEST, b"step-00000002-a0003"),
    "of no checkpoint": (NEWEST, b"step-0000000r-a0001"),
    "no manifest": (b"MANIFEST.json", b"MANIFEST.json".replace(b"j", b"n")),
    "no data": (b"data/r00000", b"data/r00001"),
    "another size": (b"</Size>", b""),  # its last digit, below
    "another etag": (b"<ETag>", b"<EUag>"),
}


@pytest.mark.parametrize("what", LISTED)
def test_no_flipped_bit_in_a_listing_hides_the_newest_checkpoint(proxy, s3_uri, what):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    save(checkpoints, 1)
    second = save(checkpoints, 2)
    old, new = LISTED[what]
    if what == "another size":
        digit = str(len(second.encode()) % 10).encode()
        old, new = digit + b"</Size>", bytes([digit[0] ^ 1]) + b"</Size>"
    changes = 0
    for number in range(3):  # of the requests that a start makes: the folders, again, and one folder
        listings = 0

        def rewrite(path: str, body: bytes, number: int = number) -> bytes:
            nonlocal listings, changes
            if "list-type" not in path:
                return body
            listings += 1
            if listings - 1 != number or old not in body:
                return body
            changes += 1
            return body.replace(old, new)

        proxy.rewrite = rewrite
        assert checkpoints.latest() == second
        listings = 0
        assert checkpoints.next_attempt() in (2, 4)
    assert changes


def test_no_flipped_bit_in_a_listing_ends_a_save(proxy, s3_uri):
    """The one that looks for later attempts: a name in it is no proof of another driver."""
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    save(checkpoints, 1)
    proxy.rewrite = once("list-type", lambda body: body.replace(b"00000001-a0001", b"00000001-a0041"))
    second = save(checkpoints, 2)
    assert checkpoints.latest() == second


def test_no_flipped_bit_in_a_listing_deletes_what_is_pinned(proxy, s3_uri):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.pin("step-00000001-a0001")
    proxy.rewrite = lambda path, body: body.replace(b"PINNED", b"PINLED") if "list-type" in path else body
    assert checkpoints.prune(1, None, ()) == ["step-00000002-a0001"]


# ── Shares ──────────────────────────────────────────────────────────────────────────────────────────────


def save_sharded(checkpoints: Checkpoints, step: int, patience_seconds: float = 20) -> Manifest | None:
    start = uuid.uuid4().hex[:8]
    tensors = {"a": torch.arange(50), "b": torch.arange(40), "c": torch.ones(3)}

    def write(rank: int) -> Manifest | None:
        facts = replace(FACTS, step=step)
        return checkpoints.save_share(tensors, facts, Share(rank, 2, start), patience_seconds)

    with ThreadPoolExecutor(2) as pool:
        return next(iter(pool.map(write, range(2))))


def test_no_bit_of_a_share_can_be_another():
    store = open_store(f"memory://{uuid.uuid4().hex}")
    share = Share(1, 2, "5ca1ab1e")
    Checkpoints(store, "run").save_share({"a": torch.ones(3), "b": torch.ones(2)}, FACTS, share, 0)
    name = FACTS.name
    encoded = store.get(f"run/checkpoints/{name}/{share.key}")
    assert share.decode(encoded, name, 1).key.startswith("data/r00001-")
    for bit in range(8 * len(encoded)):
        with pytest.raises(CheckpointError, match="the record of rank 1 cannot be read"):
            share.decode(flipped(encoded, bit), name, 1)


def test_a_share_with_a_flipped_bit_is_read_again_and_a_damaged_one_commits_nothing(proxy, s3_uri):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    dice = random.Random(7)
    for step in range(1, 9):
        proxy.rewrite = once("/shares/", lambda body: flipped(body, dice.randrange(8 * len(body))))
        assert checkpoints.find(save_sharded(checkpoints, step).name).status == "committed"
    proxy.rewrite = lambda path, body: flipped(body, 99) if "/shares/" in path and body else body
    with pytest.raises(CheckpointError, match="the record of rank 1 cannot be read"):
        save_sharded(checkpoints, 9)
    proxy.rewrite = lambda _path, body: body
    assert checkpoints.latest().step == 8


# ── Downloads of data ───────────────────────────────────────────────────────────────────────────────────


def test_verify_and_load_read_a_part_again_alike(proxy, s3_uri, tmp_path: Path):
    run = open_run(f"{s3_uri}/run")
    manifest = save(run.checkpoints, 1)
    last = manifest.objects[0].size * 8 - 3
    proxy.rewrite = once(".safetensors", lambda body: flipped(body, last))
    assert run.checkpoints.latest(deep=True) == manifest
    proxy.rewrite = once(".safetensors", lambda body: flipped(body, last))
    into = {"model.w": torch.zeros(100), "model.v": torch.zeros(7, dtype=torch.int64)}
    run.checkpoints.load(manifest, into)
    assert torch.equal(into["model.w"], torch.arange(100.0) + 1)
