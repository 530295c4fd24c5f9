import json
import logging
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boto3.session import Session

from jebm.errors import CheckpointError
from jebm.store.checkpoint import Checkpoints, Facts, FencedError, Manifest
from jebm.store.manifest import plain_json
from jebm.store.sealed import sealed
from jebm.store.storage import open_store

PLATFORM = Path(__file__).parents[2] / "platform"


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(64, 32, generator=generator), "step": torch.tensor(step)}


def save(checkpoints: Checkpoints, step: int, attempt: int = 1, **changed) -> Manifest:
    keywords = {
        "state": {"position": step * 64, "schedule": [0.1, 0.2]},
        "config": {"run": {"seed": 7}, "model": {"width": 64}},
        "metrics": {"loss": 10.0 / step},
        "provenance": {"revision": "abc", "torch": torch.__version__},
        "world_size": 2,
        "parent": None,
    }
    return checkpoints.save(tensors_of(step), Facts(step=step, attempt=attempt, **keywords | changed))


def loaded(checkpoints: Checkpoints, manifest: Manifest) -> dict[str, torch.Tensor]:
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}
    checkpoints.load(manifest, into)
    return into


@pytest.fixture
def checkpoints(store) -> Checkpoints:
    return Checkpoints(store, "run")


def test_what_is_saved_comes_back(store, checkpoints):
    assert checkpoints.latest() is None
    assert checkpoints.list() == []
    manifest = save(checkpoints, 1200, parent="step-00000600-a0001")
    assert manifest.name == "step-00001200-a0001"
    assert manifest.state == {"position": 76800, "schedule": [0.1, 0.2]}
    assert checkpoints.latest() == manifest
    assert torch.equal(loaded(checkpoints, manifest)["w"], tensors_of(1200)["w"])
    keys = [info.key for info in store.list()]
    folder = "run/checkpoints/step-00001200-a0001"
    assert keys == [f"{folder}/MANIFEST.json", f"{folder}/{manifest.objects[0].key}"]
    (found,) = checkpoints.list()
    assert (found.status, found.step, found.attempt, found.manifest) == ("committed", 1200, 1, manifest)
    assert found.size == sum(info.size for info in store.list())


def test_the_manifest_is_plain_json(store, checkpoints):
    manifest = save(checkpoints, 1)
    content = json.loads(store.get(f"run/checkpoints/{manifest.name}/MANIFEST.json"))
    assert (content["format"], content["version"], content["world_size"]) == ("jebm-checkpoint", 2, 2)
    assert content["config"] == {"run": {"seed": 7}, "model": {"width": 64}}
    assert len(content["config_sha256"]) == 64
    assert content["objects"][0]["part_size"] == 16 << 20


def test_newest_is_the_highest_step_then_the_highest_attempt(checkpoints):
    for step, attempt in ((100, 1), (200, 1), (100, 2), (150, 2)):
        save(checkpoints, step, attempt)
    assert checkpoints.latest().name == "step-00000200-a0001"
    names = [(found.step, found.attempt) for found in checkpoints.list()]
    assert names == [(200, 1), (150, 2), (100, 2), (100, 1)]
    assert checkpoints.next_attempt() == 3


def test_best_is_by_a_metric(checkpoints):
    save(checkpoints, 1, metrics={"loss": 3.0, "psnr": 10.0})
    save(checkpoints, 2, metrics={"loss": 1.0, "psnr": math.nan})
    save(checkpoints, 3, metrics={"loss": 1.0, "psnr": 9.0})
    assert checkpoints.best("loss").step == 3
    assert checkpoints.best("psnr", "max").step == 1
    assert checkpoints.best("fid") is None
    assert math.isnan(checkpoints.list()[1].manifest.metrics["psnr"])


def test_a_checkpoint_without_manifest_is_none(store, checkpoints, caplog):
    save(checkpoints, 1)
    manifest = save(checkpoints, 2)
    store.delete([f"run/checkpoints/{manifest.name}/MANIFEST.json"])
    assert checkpoints.latest().step == 1
    assert [found.status for found in checkpoints.list()] == ["partial", "committed"]
    assert "it has no manifest" in caplog.text


def test_a_missing_object_leads_back_to_the_checkpoint_before(store, checkpoints, caplog):
    save(checkpoints, 1)
    manifest = save(checkpoints, 2)
    store.delete([f"run/checkpoints/{manifest.name}/{manifest.objects[0].key}"])
    assert checkpoints.latest().step == 1
    assert "is missing" in caplog.text
    assert checkpoints.list()[0].status == "corrupt"
    with pytest.raises(CheckpointError, match="is gone"):
        loaded(checkpoints, manifest)


def test_a_flipped_bit_leads_back_to_the_checkpoint_before(store, checkpoints, caplog):
    save(checkpoints, 1)
    manifest = save(checkpoints, 2)
    key = f"run/checkpoints/{manifest.name}/{manifest.objects[0].key}"
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(CheckpointError, match="does not match its CRC32"):
        loaded(checkpoints, manifest)
    assert checkpoints.latest().step == 1
    assert "does not match its CRC32" in caplog.text


def test_a_copied_run_is_whole(store, checkpoints):
    manifest = save(checkpoints, 1)
    time.sleep(0.01)  # so that a copy has another time, and with it another etag, on a local disk
    for info in list(store.list("run/")):
        store.put(f"copy/{info.key.removeprefix('run/')}", store.get(info.key))
    copies = Checkpoints(store, "copy")
    assert copies.latest() == manifest
    assert torch.equal(loaded(copies, manifest)["w"], tensors_of(1)["w"])


def test_of_two_writers_the_second_is_refused(store, checkpoints):
    first = save(checkpoints, 1)
    with pytest.raises(FencedError, match="another writer"):
        save(checkpoints, 1)
    assert checkpoints.latest() == first
    assert len(list(store.list())) == 2


def test_our_own_manifest_is_no_other_writer(proxy, s3_uri):
    lost = []

    def lose(method, path):
        if method == "PUT" and path.endswith("MANIFEST.json") and not lost:
            lost.append(path)
            return "lose"
        return None

    proxy.fault = lose
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    manifest = save(checkpoints, 1)
    assert lost
    assert checkpoints.latest() == manifest


def test_prune_keeps_what_it_should(store, checkpoints):
    for step in range(1, 8):
        save(checkpoints, step)
    broken = checkpoints.list()[0].manifest
    store.delete([f"run/checkpoints/{broken.name}/{broken.objects[0].key}"])
    store.put("run/checkpoints/step-00000002-a0009/data/on-its-way", b"x")
    pruned = checkpoints.prune(keep_last=2, keep_every=4, protect=["step-00000001-a0001"])
    # 7 is broken and does not count; 6 and 5 are the last two; 4 is an every-4th; 1 is protected.
    assert pruned == ["step-00000003-a0001", "step-00000002-a0001"]
    assert [found.step for found in checkpoints.list()] == [7, 6, 5, 4, 2, 1]
    assert not list(store.list("run/checkpoints/step-00000003"))
    with pytest.raises(ValueError, match="keep_last"):
        checkpoints.prune(keep_last=0, keep_every=None, protect=())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"state": {"x": torch.ones(1)}}, r"state\.x: Tensor"),
        ({"state": {"x": [1, math.inf]}}, r"state\.x\[1\]: float"),
        ({"config": {"x": {1: "a"}}}, r"config\.x: the key 1"),
        ({"state": {"x": "y" * (1 << 20)}}, "a manifest of"),
        ({"parent": "../elsewhere"}, "parent"),
        ({"step": -1}, "step"),
        ({"world_size": 0}, "world_size"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(changed, message):
    store = open_store(f"memory://{message}")
    keywords = {"state": {}, "config": {}, "metrics": {}, "provenance": {}, "world_size": 1, "parent": None}
    facts = Facts(**{"step": 1, "attempt": 1} | keywords | changed)
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(store, "run").save({"w": torch.ones(2)}, facts)
    assert list(store.list()) == []


@pytest.mark.parametrize("run", ["", "a b", "../a", "a/../b", "/a", "a/", ".hidden", "a\n"])
def test_a_run_is_called_by_a_name(run):
    with pytest.raises(CheckpointError, match="use letters"):
        Checkpoints(open_store("memory://names"), run)


def hostile(**changed):
    return lambda content: content | changed


def hostile_object(**changed):
    return lambda content: content | {"objects": [content["objects"][0] | changed]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hostile(format="pickle"), "format"),
        (hostile(version=3), "version '3'"),
        (hostile(version=True), "version 'True'"),
        (hostile(version="2"), "reads versions 1 and 2"),
        (hostile(extra=1), "unknown fields"),
        (lambda content: {k: v for k, v in content.items() if k != "state"}, "unknown fields"),
        (hostile(run="../../etc"), "run"),
        (hostile(step="1"), "step"),
        (hostile(step=True), "step"),
        (hostile(step=10**40), "step"),
        (hostile(attempt=-1), "attempt"),
        (hostile(world_size=None), "world_size"),
        (hostile(created="yesterday"), "isoformat"),
        (hostile(created="2026-01-01T00:00:00"), "UTC"),
        (hostile(created=5), "created"),
        (hostile(config={"run": 1}), "config_sha256"),
        (hostile(config=[]), "config"),
        (hostile(provenance={"a": 1}), "provenance"),
        (hostile(metrics={"a": "b"}), "metrics"),
        (hostile(metrics={"a": True}), "metrics"),
        (hostile(state=None), "state"),
        (hostile(parent="step-1/../.."), "parent"),
        (hostile(objects=[]), "objects"),
        (hostile(objects={}), "objects"),
        (hostile(objects=[1]), "object"),
        (lambda content: content | {"objects": content["objects"] * 2}, "twice"),
        (lambda content: content | {"objects": content["objects"] * 10_001}, "more than"),
        (lambda content: content | {"objects": [*content["objects"], {}]}, "missing or unknown fields"),
        (hostile_object(key="../../other/data"), "data key"),
        (hostile_object(key="data/r00000-00000000.safetensors\n"), "data key"),
        (hostile_object(key=["data"]), "data key"),
        (hostile_object(size=-5), "size"),
        (hostile_object(size=10**30), "size"),
        (hostile_object(size=1.5), "size"),
        (hostile_object(part_size=0), "part_size"),
        (hostile_object(part_size=1), "crc32"),
        (hostile_object(crc32=[]), "crc32"),
        (hostile_object(crc32=["x"]), "crc32"),
        (hostile_object(crc32=[1 << 32]), "crc32"),
        (hostile_object(etag=None), "etag"),
        (hostile_object(extra=1), "fields"),
    ],
)
def test_a_hostile_manifest_is_refused(change, message, caplog):
    store = open_store(f"memory://hostile-{id(change)}")
    checkpoints = Checkpoints(store, "run")
    save(checkpoints, 1)
    key = f"run/checkpoints/{save(checkpoints, 2).name}/MANIFEST.json"
    content = json.loads(store.get(key))
    del content["sha256"]
    encoded = sealed(change(content))
    with pytest.raises(CheckpointError, match=message):
        Manifest.decode(encoded)
    store.put(key, encoded)
    assert checkpoints.latest().step == 1


@pytest.mark.parametrize(
    "encoded", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 20) + b"{}", b"NaN", b"[]"]
)
def test_a_manifest_that_is_no_json_is_refused(encoded):
    with pytest.raises(CheckpointError):
        Manifest.decode(encoded)
    store = open_store("memory://no-json")
    store.put("run/checkpoints/step-00000001-a0001/MANIFEST.json", encoded)
    with pytest.raises(CheckpointError, match=r"none that can be read \(step-00000001-a0001: ") as refused:
        Checkpoints(store, "run").latest()
    assert str(refused.value).endswith(
        "; jebm checkpoints verify memory://no-json/run --deep says what is damaged"
    )


def test_a_manifest_speaks_for_its_own_folder(store, checkpoints):
    manifest = save(checkpoints, 1)
    for info in list(store.list("run/checkpoints/")):
        store.put(info.key.replace("step-00000001", "step-00000009"), store.get(info.key))
    assert checkpoints.list()[0].status == "corrupt"
    assert checkpoints.latest() == manifest


def test_a_manifest_is_the_same_after_a_round(checkpoints):
    manifest = save(checkpoints, 3, state={"tuple": (1, 2.5, None, True, "ü")})
    assert Manifest.decode(manifest.encode()) == manifest
    assert manifest.state == {"tuple": [1, 2.5, None, True, "ü"]}
    other = replace(manifest, config=dict(reversed(manifest.config.items())))
    assert other.config_sha256 == manifest.config_sha256


def test_plain_json_is_a_copy():
    state = {"a": [1, {"b": 2}]}
    copy = plain_json(state, "state")
    state["a"][1]["b"] = 3
    assert copy == {"a": [1, {"b": 2}]}


SAVES_UNTIL_KILLED = """
import sys, torch
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.storage import open_store
checkpoints = Checkpoints(open_store(sys.argv[1]), "run")
keywords = dict(attempt=1, state={}, config={}, metrics={}, provenance={}, world_size=1, parent=None)
checkpoints.save({"w": torch.arange(100)}, Facts(step=1, **keywords))
print("saved", flush=True)
checkpoints.save({"w": torch.zeros(100 << 20)}, Facts(step=2, **keywords))
"""


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_a_process_killed_in_mid_upload_leaves_what_was_there(kind, s3, s3_uri, tmp_path, monkeypatch):
    for name, value in s3.environment("admin").items():  # only an administrator sees what is under way
        monkeypatch.setenv(name, value)
    uri = s3_uri if kind == "s3" else str(tmp_path)
    client = Session().client("s3")

    def under_way() -> bool:
        if kind == "local":
            return any(path.stat().st_size for path in tmp_path.rglob(".partial-*"))
        uploads = client.list_multipart_uploads(Bucket="jebm").get("Uploads", [])
        return any(upload["Key"].startswith(uri.removeprefix("s3://jebm/")) for upload in uploads)

    monkeypatch.setenv("PYTHONPATH", str(PLATFORM))
    command = [sys.executable, "-c", SAVES_UNTIL_KILLED, uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "saved\n"
        while not under_way():
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    checkpoints = Checkpoints(open_store(uri), "run")
    into = {"w": torch.zeros(100, dtype=torch.int64)}
    manifest = checkpoints.latest()
    checkpoints.load(manifest, into)
    assert torch.equal(into["w"], torch.arange(100))
    assert [found.name for found in checkpoints.list()] == ["step-00000001-a0001"]


@pytest.fixture(autouse=True)
def _hear_all(caplog):
    caplog.set_level(logging.INFO, logger="jebm")
