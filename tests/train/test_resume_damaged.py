"""A run whose newest checkpoint is damaged, hostile or NaN resumes from an older one, or not at all."""

import json
import math
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_config

from jebm.config import Config
from jebm.data.manifest import read_manifest
from jebm.errors import CheckpointError, ConfigError
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.layout import StoredObject
from jebm.store.storage import Store, open_store
from jebm.train.loop import fit
from jebm.train.plan import make_plan
from jebm.train.resume import resume
from jebm.train.runtime import process_runtime
from jebm.train.state import TrainState

OLDER, NEWEST = "step-00000005-a0001", "step-00000010-a0001"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a run of ten steps and checkpoints of steps 5 and 10."""
    storage = tmp_path_factory.mktemp("trained")
    config = tiny_config(storage, train__epochs=0.4, checkpoint__every_steps=5)
    with process_runtime(config) as runtime:
        fit(config, runtime, provenance={})
    return storage


@pytest.fixture
def config(trained: Path, tmp_path: Path) -> Config:
    """A run of its own with these checkpoints, and more to do."""
    shutil.copytree(trained, tmp_path / "runs")  # with the etags of a local folder, which are times
    return tiny_config(tmp_path / "runs", train__epochs=0.8)


def place(config: Config) -> tuple[Store, Checkpoints]:
    store = open_store(config.run.storage)
    return store.child(f"{config.run.name}/checkpoints"), Checkpoints(store, config.run.name)


def resumed(config: Config) -> tuple[Manifest | None, TrainState]:
    with process_runtime(config) as runtime:
        state = TrainState.build(config, runtime)
        data = read_manifest(open_store(config.data.train))
        return resume(config, runtime, state, place(config)[1], data), state


def changed(store: Store, name: str, change: Callable[[bytearray], None]) -> None:
    """Change a checkpoint's data, under a manifest that vouches for it."""
    folder = store.child(name)
    manifest = Manifest.decode(folder.get("MANIFEST.json"))
    (stored,) = manifest.objects
    data = bytearray(folder.get(stored.key))
    change(data)
    header = zlib.crc32(data[: 8 + int.from_bytes(data[:8], "little")])
    etag = folder.put(stored.key, bytes(data)).etag
    described = StoredObject(stored.key, len(data), etag, 1 << 24, (zlib.crc32(data),), header)
    folder.put("MANIFEST.json", replace(manifest, objects=(described,)).encode())


def with_nan(data: bytearray) -> None:
    data[-4:] = torch.tensor([math.nan]).numpy().tobytes()  # of the step of an optimizer


def with_overlap(data: bytearray) -> None:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    data[:] = len(text).to_bytes(8, "little") + text + data[8 + length :]


def without_manifest_bytes(store: Store, name: str) -> None:
    store.put(f"{name}/MANIFEST.json", b"\0" * 100)


SPOILS: dict[str, Callable[[Store, str], None]] = {
    "NaN": lambda store, name: changed(store, name, with_nan),
    "overlap": lambda store, name: changed(store, name, with_overlap),
    "manifest": without_manifest_bytes,
}


@pytest.mark.parametrize("what", SPOILS)
def test_a_resume_takes_the_older_one_that_is_whole(
    config: Config, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = {name: tensor.clone() for name, tensor in resumed_at(config, OLDER).items()}
    store, _ = place(config)
    SPOILS[what](store, NEWEST)
    manifest, state = resumed(config)
    assert manifest is not None
    assert (manifest.name, state.step) == (OLDER, 5)
    assert f"{NEWEST} is passed over" in caplog.text
    found = state.tensors()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def resumed_at(config: Config, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one checkpoint."""
    _, checkpoints = place(config)
    found = checkpoints.find(name)
    assert found is not None
    assert found.manifest is not None
    with process_runtime(config) as runtime:
        tensors = TrainState.build(config, runtime).tensors()
    checkpoints.load(found.manifest, tensors)
    return tensors


@pytest.mark.parametrize("what", SPOILS)
def test_where_none_is_whole_the_run_does_not_begin_anew(config: Config, what: str) -> None:
    store, _ = place(config)
    for name in (OLDER, NEWEST):
        SPOILS[what](store, name)
    before = {info.key: store.get(info.key) for info in store.list()}
    with pytest.raises(CheckpointError) as refused, process_runtime(config) as runtime:
        fit(config, runtime, provenance={})
    line = str(refused.value)
    assert OLDER in line
    assert NEWEST in line
    assert "delete their folders to begin anew, or choose another run.name" in line
    assert {info.key: store.get(info.key) for info in store.list()} == before
    if what != "NaN":  # what takes no look at the values is known before the start
        with pytest.raises(CheckpointError, match="delete their folders to begin anew"):
            make_plan(config)
    else:
        assert make_plan(config).resumes_at == 10


def test_what_a_killed_save_left_does_not_keep_a_run_from_its_beginning(config: Config) -> None:
    store, _ = place(config)
    store.delete([f"{name}/MANIFEST.json" for name in (OLDER, NEWEST)])
    assert make_plan(config).resumes_at is None
    assert resumed(config)[0] is None


def test_a_whole_checkpoint_of_something_else_is_named_in_a_short_line(config: Config) -> None:
    store, _ = place(config)
    manifest = Manifest.decode(store.get(f"{NEWEST}/MANIFEST.json"))
    foreign = replace(manifest, state={}, config={f"key{number}": number for number in range(10_000)})
    store.put(f"{NEWEST}/MANIFEST.json", foreign.encode())
    with pytest.raises(
        ConfigError, match=r"has a checkpoint \(step 10\) made with another .* and \d+ more; "
    ) as caught:
        resumed(config)
    assert len(str(caught.value)) < 2000
