"""A bucket that somebody else has written to: nothing in it runs, fills the memory or leads elsewhere."""

import io
import json
import os
import pickle
import uuid
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jebm.errors import CheckpointError
from jebm.store.checkpoint import Checkpoints, Facts, Manifest
from jebm.store.layout import StoredObject
from jebm.store.parts import damages, read_headers
from jebm.store.sealed import sealed
from jebm.store.storage import Store, open_store
from jebm.store.stream import restore_tensors, upload_tensors
from jebm.untrusted import parsed_object

MIB = 1 << 20
FACTS = Facts(
    step=0,
    attempt=1,
    state={},
    config={},
    metrics={},
    provenance={},
    world_size=1,
    parent=None,
)
FOLDER = "run/checkpoints/step-00000002-a0001"


def save(checkpoints: Checkpoints, step: int) -> Manifest:
    return checkpoints.save({"w": torch.arange(100) + step}, replace(FACTS, step=step))


def is_whole(checkpoints: Checkpoints, manifest: Manifest) -> bool:
    into = {"w": torch.zeros(100, dtype=torch.int64)}
    checkpoints.load(manifest, into)
    return torch.equal(into["w"], torch.arange(100) + manifest.step)


def described(store: Store, key: str) -> StoredObject:
    """A description that every object fits: what a hostile manifest would say of its own data."""
    info, data = store.head(key), store.get(key)
    return StoredObject(key, info.size, info.etag, max(info.size, 1), (zlib.crc32(data),))


# ── Pickles ─────────────────────────────────────────────────────────────────────────────────────────────


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


DATA = "data/r00000-00000000.safetensors"
NAMES = [
    # torch, Lightning, transformers
    *("model.pt", "model.pth", "checkpoint.pt", "last.ckpt", "pytorch_model.bin", "optimizer.pt"),
    # torch.distributed.checkpoint
    *(".metadata", "__0_0.distcp", "data/.metadata", "data/__0_0.distcp"),
    # Ray
    *("trainer.pkl", "tuner.pkl", "searcher-state.pkl", "trainable.pkl", "params.pkl", ".tuner_state"),
    *("dict_checkpoint.pkl", "checkpoint_manager_snapshot.json", ".tune_metadata", ".is_checkpoint"),
    # ours
    *("MANIFEST.json", DATA, "latest", "PINNED", "data/r00000.part.json"),
]


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_no_pickle_is_ever_opened(store, tmp_path, form, caplog):
    trap = tmp_path / "executed"
    if form == "pickle":
        hostile = pickle.dumps(Payload(trap))
    else:
        torch.save({"model": Payload(trap)}, file := io.BytesIO())
        hostile = file.getvalue()
    checkpoints = Checkpoints(store, "run")
    first = save(checkpoints, 1)
    third = save(checkpoints, 3)
    for name in NAMES:
        for folder in ("", "run/", "run/checkpoints/", f"{FOLDER}/", f"run/checkpoints/{first.name}/"):
            if (folder, name) != (f"run/checkpoints/{first.name}/", "MANIFEST.json"):
                store.put(f"{folder}{name}", hostile)
    # Under a manifest that vouches for it, and under one that is whole but for its data.
    folder = store.child(f"run/checkpoints/{third.name}")
    store.put(f"run/checkpoints/{third.name}/{DATA}", hostile)
    forged = replace(third, objects=(described(folder, DATA),))
    folder.put("MANIFEST.json", forged.encode())

    statuses = {found.step: found.status for found in checkpoints.list()}
    assert statuses == {3: "committed", 2: "corrupt", 1: "committed"}
    assert checkpoints.latest() == forged
    with pytest.raises(CheckpointError, match="a header of"):
        is_whole(checkpoints, forged)
    assert "a header of" in damages(folder, forged.objects)[0]
    assert checkpoints.latest(deep=True) == first
    folder.delete(["MANIFEST.json"])
    assert checkpoints.latest() == first
    assert checkpoints.latest(deep=True) == first
    assert is_whole(checkpoints, first)
    assert checkpoints.best("loss") is None
    assert checkpoints.next_attempt() == 2
    assert checkpoints.orphans(3600) == []
    checkpoints.prune(keep_last=1, keep_every=None, protect=())
    assert not trap.exists()
    # The trap works: whoever opens it makes the file.
    pickle.loads(hostile) if form == "pickle" else torch.load(io.BytesIO(hostile), weights_only=False)
    assert trap.exists()


# ── Manifests ───────────────────────────────────────────────────────────────────────────────────────────


def changed(text: str, old: str, new: str) -> bytes:
    """The text with a change, under a hash that vouches for it where it is JSON at all."""
    assert text.count(old) == 1
    spoiled = text.replace(old, new).encode()
    try:
        content = parsed_object(spoiled, MIB)
    except ValueError:
        return spoiled
    del content["sha256"]
    return sealed(content)


MANIFESTS = {
    "twice": ('"step":2', '"step":3,"step":2', "twice"),
    "twice in an object": ('"part_size":', '"part_size":1,"part_size":', "twice"),
    "huge number": ('"step":2', f'"step":{"9" * 5000}', "digits"),
    "huge float": ('"metrics":{}', '"metrics":{"a":1e999}', "float"),
    "nan": ('"metrics":{}', '"metrics":{"a":NaN}', "float"),
    "no number": ('"world_size":1', '"world_size":"1"', "world_size"),
    "half a character": ('"provenance":{}', '"provenance":{"a":"\\ud800"}', "surrogates"),
    "deep": ('"state":{}', '"state":' + '{"a":' * 100 + "1" + "}" * 100, "levels deep"),
    "too deep": ('"state":{}', '"state":' + "[" * 50_000 + "]" * 50_000, "levels deep"),
    "path escape": ('"key":"data/', '"key":"data/../../../../other/', "data key"),
    "absolute": ('"key":"data/', '"key":"/etc/', "data key"),
    "drive": ('"key":"data/', '"key":"data\\\\..\\\\', "data key"),
    "absurd size": ('"size":', '"size":1000000000000000000', "size"),
    "absurd part": ('"part_size":', '"part_size":9999999999', "part_size"),
    "parent": ('"parent":null', '"parent":"../../other/checkpoints/step-00000001-a0001"', "parent"),
    "run": ('"run":"run"', '"run":"../run"', "run"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_hostile_manifest_is_passed_over(s3_uri, what, caplog):
    old, new, words = MANIFESTS[what]
    store = open_store(s3_uri)
    checkpoints = Checkpoints(store, "run")
    first, second = save(checkpoints, 1), save(checkpoints, 2)
    text = second.encode().decode()
    store.put(f"{FOLDER}/MANIFEST.json", changed(text, old, new))
    with pytest.raises(CheckpointError, match=words):
        Manifest.decode(changed(text, old, new))
    assert checkpoints.latest() == first
    assert "is passed over" in caplog.text
    assert [found.status for found in checkpoints.list()] == ["corrupt", "committed"]
    assert is_whole(checkpoints, first)


def test_a_manifest_that_describes_another_object_size_is_passed_over(store):
    checkpoints = Checkpoints(store, "run")
    first, second = save(checkpoints, 1), save(checkpoints, 2)
    (stored,) = second.objects
    huge = replace(stored, size=50 << 40, part_size=5 << 30, crc32=(0,) * (10 << 10))
    store.put(f"{FOLDER}/MANIFEST.json", replace(second, objects=(huge,)).encode())
    assert checkpoints.latest() == first
    assert "instead of" in checkpoints.list()[0].reason


def test_a_gigabyte_of_json_is_refused_by_its_size(tmp_path):
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run")
    first = save(checkpoints, 1)
    path = tmp_path / FOLDER / "MANIFEST.json"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(1 << 30)  # a file with nothing in it: reading it would show in the memory
    before = peak_bytes()
    assert checkpoints.latest() == first
    assert peak_bytes() - before < 64 * MIB
    assert f"{1 << 30} bytes" in checkpoints.list()[0].reason


def test_a_manifest_above_the_limit_is_not_even_asked_for(proxy, s3_uri):
    store = open_store(s3_uri)
    checkpoints = Checkpoints(store, "run")
    first = save(checkpoints, 1)
    store.put(f"{FOLDER}/MANIFEST.json", b" " * (MIB + 1))
    proxy.seen.clear()
    assert checkpoints.latest() == first
    assert not [line for line in proxy.seen if line.startswith("GET") and f"{FOLDER}/MANIFEST" in line]


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) << 10


# ── Data ────────────────────────────────────────────────────────────────────────────────────────────────

HEADERS = {
    "no JSON": (b"\x80\x04\x95", "decode|JSON|Expecting"),
    "a list": (b"[]", "no JSON object"),
    "deep": (b"[" * 100_000, "levels deep"),
    "absurd shape": (
        {"w": {"dtype": "I64", "shape": [1 << 62, 4], "data_offsets": [0, 8]}},
        "number of bytes",
    ),
    "product that wraps": (
        {"w": {"dtype": "I64", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}},
        "number of bytes",
    ),
    "negative": ({"w": {"dtype": "I64", "shape": [-1], "data_offsets": [0, 8]}}, "no counts"),
    "behind the end": (
        {"w": {"dtype": "I64", "shape": [1 << 40], "data_offsets": [0, 8 << 40]}},
        "end at byte",
    ),
    "overlap": (
        {
            "w": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
            "v": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        },
        "does not begin where",
    ),
    "unknown dtype": ({"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}, "unknown dtype"),
    "another dtype": ({"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, "does not fit"),
    "another shape": ({"w": {"dtype": "I64", "shape": [1, 1], "data_offsets": [0, 8]}}, "does not fit"),
    "another name": ({"../w": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, "does not fit"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_header_under_a_manifest_that_vouches_for_it_writes_nothing(what):
    header, words = HEADERS[what]
    store = open_store(f"memory://{uuid.uuid4().hex}")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    store.put("a", len(text).to_bytes(8, "little") + text + bytes(8))
    into = {"w": torch.full((1,), 7)}
    before = peak_bytes()
    with pytest.raises(CheckpointError, match=words):
        restore_tensors(store, [described(store, "a")], into)
    assert peak_bytes() - before < 64 * MIB
    assert into["w"].item() == 7


def test_a_tensor_in_two_objects_writes_nothing():
    """Each object is good by itself, and only together they are not what any writer writes."""
    store = open_store(f"memory://{uuid.uuid4().hex}")
    checkpoints = Checkpoints(store, "run")
    first, second = save(checkpoints, 1), save(checkpoints, 2)
    folder = store.child(FOLDER)
    copy = replace(second.objects[0], key="data/r00001-00000000.safetensors")
    copy = replace(copy, etag=folder.put(copy.key, folder.get(second.objects[0].key)).etag)
    forged = replace(second, objects=(second.objects[0], copy))
    folder.put("MANIFEST.json", forged.encode())
    into = {"w": torch.full((100,), 7)}
    with pytest.raises(CheckpointError, match=r"r00001-00000000\.safetensors: 'w' is in another"):
        checkpoints.load(forged, into)
    assert torch.equal(into["w"], torch.full((100,), 7))
    assert is_whole(checkpoints, first)


def test_many_headers_are_no_order_for_memory(monkeypatch):
    """Together they may not be longer than one."""
    monkeypatch.setattr("jebm.store.parts.HEADER_BYTES", 10_000)
    store = open_store(f"memory://{uuid.uuid4().hex}")
    objects = []
    for number in range(30):
        upload_tensors(store, f"{number}", {f"{number}-{'n' * 600}": torch.ones(1)})
        objects.append(described(store, f"{number}"))
    assert len(read_headers(store, objects[:12])) == 12
    with pytest.raises(CheckpointError, match="a header of"):
        read_headers(store, objects)


@pytest.mark.parametrize("length", [0, 1, 9, 1 << 24, (1 << 24) + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_length_is_no_order_for_memory(length):
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put("a", length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="a header of"):
        read_headers(store, [described(store, "a")])


def test_a_name_in_the_bucket_does_not_lead_out_of_it(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "r00000-00000000.safetensors").write_bytes(os.urandom(64))
    store = open_store(str(tmp_path / "store"))
    checkpoints = Checkpoints(store, "run")
    first, second = save(checkpoints, 1), save(checkpoints, 2)
    link = tmp_path / "store" / FOLDER / "data"
    for path in link.iterdir():
        path.unlink()
    link.rmdir()
    link.symlink_to(outside)
    (tmp_path / "outside" / Path(second.objects[0].key).name).write_bytes(b"x" * second.objects[0].size)
    assert checkpoints.latest() == first
    checkpoints.prune(keep_last=1, keep_every=None, protect=())
    assert len(list(outside.iterdir())) == 2
