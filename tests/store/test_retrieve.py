"""Checkpoints come back: whole, by part, and never as something that they are not."""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from jebm.errors import CheckpointError, StoreError
from jebm.store.checkpoint import Checkpoints, Facts, Manifest
from jebm.store.compare import compare
from jebm.store.mirror import download
from jebm.store.retrieve import RunStore, open_run, verify_checkpoint
from jebm.store.storage import Store

if TYPE_CHECKING:
    from tests.store.conftest import Proxy

JOBS = Path(__file__).resolve().parents[2] / "jobs"
PART = 5 << 20  # the least that S3 takes
SLICE = 4 << 20


def ignore(_done: int, _total: int) -> None:
    """Show no progress."""


def state(seed: int = 0) -> dict[str, Tensor]:
    """A state of four parts: 16.5 MB of odd pieces, an empty tensor and a scalar among them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.first.weight": torch.randn(1000, 1501, generator=generator),
        "model.empty": torch.zeros(0, 3),
        "model.half": torch.randn(77, generator=generator).to(torch.bfloat16),
        "ema.first.weight": torch.randn(1000, 1501, generator=generator),
        "optimizer.moment": torch.randn(1_100_003, generator=generator),
        "optimizer.step": torch.tensor(seed, dtype=torch.int64),
    }


def save(checkpoints: Checkpoints, step: int, tensors: Mapping[str, Tensor], attempt: int = 1) -> Manifest:
    facts = Facts(
        step=step,
        attempt=attempt,
        state={"position": step},
        config={"energy": {"width": 100}, "run": {"name": "mine"}},
        metrics={"distortion": 100.0 - step},
        provenance={"torch": "2"},
        world_size=1,
        parent=None,
    )
    return checkpoints.save(tensors, facts)


class Watched:
    """A store that notes what is read of data, and may hurt it on its way."""

    def __init__(self, store: Store, reads: list[tuple[int, int]] | None = None) -> None:
        self._store = store
        self.reads = [] if reads is None else reads
        self.hurt: Callable[[int], bool] = lambda _number: False

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def child(self, prefix: str) -> "Watched":
        child = Watched(self._store.child(prefix), self.reads)
        child.hurt = self.hurt
        return child

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        if ".safetensors" in key and etag is not None:  # headers are read without one
            self.reads.append((offset, sum(piece.nbytes for piece in pieces)))
            if self.hurt(len(self.reads)):
                raise StoreError("the line is cut")
        self._store.read_into(key, offset, pieces, etag=etag)

    @property
    def bytes_read(self) -> int:
        return sum(size for _, size in self.reads)


def watched(run: RunStore) -> tuple[RunStore, Watched]:
    store = Watched(run.root)
    return RunStore(store, run.name, Checkpoints(store, run.name)), store  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jebm.store.stream.PART_BYTES", PART)


@pytest.fixture
def local(tmp_path: Path) -> RunStore:
    return open_run(str(tmp_path / "runs" / "mine"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def loaded(checkpoints: Checkpoints, manifest: Manifest) -> dict[str, Tensor]:
    into = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    checkpoints.load(manifest, into)
    return into


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def data_file(target: Path, manifest: Manifest) -> Path:
    return target / "mine" / "checkpoints" / manifest.name / manifest.objects[0].key


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def flip_in_store(store: Store, key: str, position: int) -> None:
    data = bytearray(store.get(key))
    data[position] ^= 1
    store.put(key, bytes(data))


# ── A run, and a checkpoint of it ───────────────────────────────────────────────────────────────────────


def test_a_uri_names_the_store_and_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for uri, root, name in [
        ("memory://a/runs/mine/", "memory://a/runs", "mine"),
        ("memory://a/mine", "memory://a", "mine"),
        ("runs/mine", (tmp_path / "runs").as_uri(), "mine"),
        ("mine", tmp_path.as_uri(), "mine"),
        (str(tmp_path / "mine"), tmp_path.as_uri(), "mine"),
        ((tmp_path / "mine").as_uri(), tmp_path.as_uri(), "mine"),
    ]:
        run = open_run(uri)
        assert (run.root.uri, run.name) == (root, name)
    for uri in ["s3://bucket", "s3://", "memory://a", "/"]:
        with pytest.raises(StoreError, match=r"names no (run|bucket)"):
            open_run(uri)
    with pytest.raises(StoreError, match="an empty storage URI"):
        open_run("")


def test_a_checkpoint_is_chosen_by_step_by_metric_or_as_the_latest(local: RunStore) -> None:
    small = {"model.x": torch.zeros(2)}
    manifests = {step: save(local.checkpoints, step, small) for step in (1, 2, 3)}
    again = save(local.checkpoints, 3, small, attempt=2)
    assert local.choose() == again
    assert local.choose(step=3) == again
    assert local.choose(step=1) == manifests[1]
    assert local.choose(best="distortion", mode="max") == manifests[1]
    local.folder(again.name).delete([again.objects[0].key])
    assert local.choose(step=3) == manifests[3]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are 1, 2, 3$"):
        local.choose(step=7)
    with pytest.raises(CheckpointError, match="no checkpoint with a finite los; metrics are distortion"):
        local.choose(best="los")
    local.folder(manifests[2].name).delete([manifests[2].objects[0].key])
    with pytest.raises(CheckpointError, match=r"step-00000002-a0001 is corrupt: .* is missing"):
        local.choose(step=2)


def test_a_run_that_is_not_there_is_told_from_one_without_checkpoints(local: RunStore) -> None:
    with pytest.raises(CheckpointError, match=r"no such run; give run\.storage/run\.name"):
        local.choose()
    local.root.put("mine/model.safetensors", b"{}")
    local.root.put("mine/other/run.json", b"{}")
    with pytest.raises(CheckpointError, match=r"mine: is no run, .*; give run\.storage/run\.name"):
        local.choose()
    local.root.put("mine/run.json", b"{}")
    with pytest.raises(CheckpointError, match="mine: no whole checkpoint"):
        local.choose(step=1)


# ── Download ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("store", ["s3", "memory"], indirect=True)
def test_a_download_is_a_store_of_its_own(store: Store, target: Path) -> None:
    run = RunStore(store, "mine", Checkpoints(store, "mine"))
    manifest = save(run.checkpoints, 1, state())
    seen: list[tuple[int, int]] = []
    done = download(run, manifest, target, lambda count, total: seen.append((count, total)))
    size = manifest.objects[0].size
    assert (done.bytes_fetched, done.bytes_kept) == (size, 0)
    assert sum(count for count, _ in seen) == size
    assert {total for _, total in seen} == {size}
    here = open_run(str(target / "mine"))
    assert here.checkpoints.latest() == manifest
    assert equal(loaded(here.checkpoints, manifest), state())
    key = f"{manifest.name}/MANIFEST.json"
    assert (done.folder / "MANIFEST.json").read_bytes() == store.get(f"mine/checkpoints/{key}")


def test_only_what_is_missing_or_damaged_is_fetched_again(local: RunStore, target: Path) -> None:
    manifest = save(local.checkpoints, 1, state())
    stored = manifest.objects[0]
    download(local, manifest, target, ignore)
    run, store = watched(local)
    assert download(run, manifest, target, ignore).bytes_fetched == 0
    assert store.reads == []
    file = data_file(target, manifest)
    flip(file, PART + 17)
    done = download(run, manifest, target, ignore)
    assert (done.bytes_fetched, done.bytes_kept) == (PART, stored.size - PART)
    assert sorted(store.reads) == [(PART, SLICE), (PART + SLICE, PART - SLICE)]
    assert equal(loaded(open_run(str(target / "mine")).checkpoints, manifest), state())
    with file.open("r+b") as opened:  # too short, then too long
        opened.truncate(2 * PART + 1)
    assert download(run, manifest, target, ignore).bytes_fetched == stored.size - 2 * PART
    with file.open("ab") as opened:
        opened.write(b"more")
    assert download(run, manifest, target, ignore).bytes_fetched == 0
    assert file.read_bytes() == local.folder(manifest.name).get(stored.key)


def test_a_broken_download_is_no_checkpoint_and_goes_on(local: RunStore, target: Path) -> None:
    manifest = save(local.checkpoints, 1, state())
    run, store = watched(local)
    store.hurt = lambda number: number > 5
    with pytest.raises(StoreError, match="the line is cut"):
        download(run, manifest, target, ignore)
    (found,) = open_run(str(target / "mine")).checkpoints.list()
    assert found.status == "partial"
    run, store = watched(local)
    done = download(run, manifest, target, ignore)
    assert done.bytes_fetched == store.bytes_read
    assert done.bytes_kept % PART in (0, manifest.objects[0].size % PART)
    assert open_run(str(target / "mine")).checkpoints.latest() == manifest
    assert max(size for _, size in store.reads) <= SLICE


def test_a_killed_download_goes_on_by_part(s3_uri: str, proxy: "Proxy", target: Path) -> None:
    run = open_run(f"{s3_uri}/mine")
    tensors = {"model.x": torch.randn(5_000_000, generator=torch.Generator().manual_seed(0))}
    manifest = save(run.checkpoints, 1, tensors)  # four parts of two slices
    stored = manifest.objects[0]
    data = run.folder(manifest.name).get(stored.key)
    asked: list[str] = []
    answered = 6

    def strike(method: str, path: str) -> str | None:
        if method == "GET" and ".safetensors" in path:
            asked.append(path)
            return "stall" if len(asked) > answered else None
        return None

    def arrived() -> int:
        there = data_file(target, manifest).read_bytes()
        parts = (slice(begin, begin + PART) for begin in range(0, stored.size, PART))
        return sum(len(data[part]) for part in parts if data[part] == there[part])

    proxy.fault = strike
    command = [sys.executable, str(JOBS / "checkpoints.py"), "get", run.uri, "--output", str(target)]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 300
        try:
            while len(asked) < 8 or not arrived():  # all that it asks for
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.kill()
    here = open_run(str(target / "mine"))
    assert here.checkpoints.list()[0].status == "partial"
    kept = arrived()
    assert 0 < kept < stored.size
    answered = 100
    asked.clear()
    done = download(run, manifest, target, ignore)
    assert (done.bytes_kept, done.bytes_fetched) == (kept, stored.size - kept)
    assert len(asked) == -(-(stored.size - kept) // PART) * 2
    assert here.checkpoints.latest() == manifest
    into = {"model.x": torch.zeros(5_000_000)}
    here.checkpoints.load(manifest, into)
    assert equal(into, tensors)


def test_what_was_hurt_on_its_way_is_asked_for_again(
    local: RunStore, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = save(local.checkpoints, 1, state())
    run, store = watched(local)
    read = Watched.read_into
    hurt: list[int] = []

    def flipping(
        self: Watched, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        read(self, key, offset, pieces, etag=etag)
        if offset == PART and not hurt:
            hurt.append(offset)
            pieces[0][0] ^= 1

    monkeypatch.setattr(Watched, "read_into", flipping)
    seen: list[int] = []
    download(run, manifest, target, lambda count, _total: seen.append(count))
    assert store.bytes_read == manifest.objects[0].size + PART
    assert sum(seen) == manifest.objects[0].size
    assert equal(loaded(open_run(str(target / "mine")).checkpoints, manifest), state())


def test_what_is_damaged_in_the_store_is_named_and_never_becomes_a_checkpoint(
    local: RunStore, target: Path
) -> None:
    manifest = save(local.checkpoints, 1, state())
    flip_in_store(local.folder(manifest.name), manifest.objects[0].key, 2 * PART)
    with pytest.raises(CheckpointError, match=r"safetensors is damaged: part 3 of 4 does not match"):
        download(local, manifest, target, ignore)
    assert open_run(str(target / "mine")).checkpoints.list()[0].status == "partial"


def test_another_checkpoint_of_the_same_name_is_left_alone(local: RunStore, target: Path) -> None:
    small = {"model.x": torch.zeros(2)}
    other = open_run(str(target / "mine"))
    save(other.checkpoints, 1, small)
    with pytest.raises(StoreError, match="holds another checkpoint called step-00000001-a0001"):
        download(local, save(local.checkpoints, 1, small), target, ignore)
    assert other.checkpoints.list()[0].status == "committed"


def test_a_disk_that_is_too_small_is_found_out_at_once(
    local: RunStore, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = save(local.checkpoints, 1, state())
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match=r"bytes do not fit into the 1,000 free ones"):
        download(local, manifest, target, ignore)
    (target / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(StoreError, match="cannot"):
        download(local, manifest, target / "file", ignore)


# ── Verification ────────────────────────────────────────────────────────────────────────────────────────


def test_every_damaged_part_is_named(local: RunStore) -> None:
    manifest = save(local.checkpoints, 1, state())
    folder, key = local.folder(manifest.name), manifest.objects[0].key
    assert verify_checkpoint(folder, manifest, ignore) == []
    flip_in_store(folder, key, 0)
    flip_in_store(folder, key, 3 * PART)
    first, last = verify_checkpoint(folder, manifest, ignore)
    assert "part 1 of 4" in first
    assert "part 4 of 4" in last
    folder.put(key, b"short")
    assert "5 bytes instead of" in verify_checkpoint(folder, manifest, ignore)[0]
    folder.delete([key])
    assert "is gone" in verify_checkpoint(folder, manifest, ignore)[0]


# ── Comparison ──────────────────────────────────────────────────────────────────────────────────────────


def test_equal_checkpoints_are_compared_without_reading_them(local: RunStore) -> None:
    first, second = save(local.checkpoints, 1, state()), save(local.checkpoints, 2, state())
    found = compare(local, first, second)
    assert (found.changed, found.added, found.removed) == ((), (), ())
    assert (found.equal, found.bytes_read) == (6, 0)


def test_only_what_checksums_leave_open_is_read(local: RunStore) -> None:
    tensors = state()
    first = save(local.checkpoints, 1, tensors)
    tensors["optimizer.moment"] = tensors["optimizer.moment"].clone()
    tensors["optimizer.moment"][-1] += 1  # in the last part, which the scalar is not in
    run, store = watched(local)
    found = compare(run, first, save(local.checkpoints, 2, tensors))
    assert found.changed == ("optimizer.moment",)
    assert found.equal == 5
    assert 0 < found.bytes_read - 2 * tensors["optimizer.moment"].nbytes < 1000  # and of its small neighbours
    assert store.bytes_read <= 2 * 2 * PART  # the parts that it lies in
    assert max(size for _, size in store.reads) <= SLICE
    everything = compare(local, first, save(local.checkpoints, 3, state(seed=1)))
    assert set(everything.changed) == set(tensors) - {"model.empty"}


def test_tensors_with_nan_are_compared_by_their_bytes(local: RunStore) -> None:
    tensors = {"model.a": torch.tensor([1.0, math.nan]), "model.b": torch.tensor([math.nan])}
    first = save(local.checkpoints, 1, tensors)
    found = compare(local, first, save(local.checkpoints, 2, tensors | {"model.a": torch.ones(2)}))
    assert (found.changed, found.equal) == (("model.a",), 1)


def test_what_lies_in_parts_of_its_own_is_changed_by_a_checksum_alone(local: RunStore) -> None:
    tensors = {"model.large": torch.zeros(4 * PART // 4)}
    first = save(local.checkpoints, 1, tensors)
    found = compare(local, first, save(local.checkpoints, 2, {"model.large": torch.ones(4 * PART // 4)}))
    assert (found.changed, found.bytes_read) == (("model.large",), 0)


def test_tensors_that_come_go_or_change_their_shape_are_told_apart(local: RunStore) -> None:
    tensors = state()
    first = save(local.checkpoints, 1, tensors)
    del tensors["ema.first.weight"]
    tensors["ema.other"] = torch.zeros(3)
    tensors["model.half"] = tensors["model.half"].float()
    found = compare(local, first, save(local.checkpoints, 2, tensors))
    assert (found.changed, found.added, found.removed) == (
        ("model.half",),
        ("ema.other",),
        ("ema.first.weight",),
    )
    assert found.equal == 4  # though they lie elsewhere now


# ── Pins ────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_pinned_survives_every_prune(store: Store) -> None:
    checkpoints = Checkpoints(store, "mine")
    names = [save(checkpoints, step, {"model.x": torch.ones(2)}).name for step in (1, 2, 3)]
    checkpoints.pin(names[0])
    checkpoints.pin(names[0])
    assert checkpoints.pinned() == checkpoints.pinned(names) == {names[0]}
    assert checkpoints.prune(1, None, (), dry_run=True) == [names[1]]
    assert len(checkpoints.list()) == 3
    assert checkpoints.prune(1, None, ()) == [names[1]]
    assert [(found.name, found.status) for found in checkpoints.list()] == [
        (names[2], "committed"),
        (names[0], "committed"),
    ]
    checkpoints.unpin(names[0])
    checkpoints.unpin(names[0])
    assert checkpoints.pinned() == frozenset()
    assert checkpoints.prune(1, None, ()) == [names[0]]
    for name in (names[0], "../elsewhere", "nothing"):
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            checkpoints.pin(name)
    assert {info.key.split("/")[2] for info in store.list()} == {names[2]}
