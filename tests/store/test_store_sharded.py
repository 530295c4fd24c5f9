"""One checkpoint written by several ranks: whole and equal to what one rank would write, or not there."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from jebm.errors import CheckpointError, StoreError
from jebm.store import stream
from jebm.store.checkpoint import Checkpoints, Facts, FencedError, Manifest
from jebm.store.compare import compare
from jebm.store.mirror import download
from jebm.store.parts import damages
from jebm.store.retrieve import open_run, read_tensors, tensor_table
from jebm.store.sealed import sealed
from jebm.store.shares import Share
from jebm.store.storage import open_store
from jebm.store.writer import AsyncWriter

PLATFORM = Path(__file__).parents[2] / "platform"
KIB, MIB = 1 << 10, 1 << 20
START = "5ca1ab1e"
FACTS = Facts(
    step=0,
    attempt=1,
    state={"position": 64},
    config={},
    metrics={"loss": 1.0},
    provenance={},
    world_size=2,
    parent=None,
)


def tensors_of(step: int, unit: int = MIB) -> dict[str, torch.Tensor]:
    """13 MiB; a share of two ranks has two parts. The same as in the writers' processes."""
    generator = torch.Generator().manual_seed(step)
    sizes = {
        "model.a": 6 * unit,
        "model.b": 4 * unit,
        "ema.a": 2 * unit,
        "ema.b": unit,
        "odd": 17,
        "empty": 0,
    }
    return {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for name, size in sizes.items()
    } | {"step": torch.tensor(step)}


def restored(checkpoints: Checkpoints, manifest: Manifest) -> dict[str, torch.Tensor]:
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}
    checkpoints.load(manifest, into)
    return into


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def is_whole(checkpoints: Checkpoints, manifest: Manifest) -> bool:
    return equal(restored(checkpoints, manifest), tensors_of(manifest.step))


def memory_checkpoints() -> Checkpoints:
    return Checkpoints(open_store(f"memory://{uuid.uuid4().hex}"), "run")


def save_sharded(checkpoints: Checkpoints, step: int, world_size: int = 2, attempt: int = 1) -> Manifest:
    """Save by all ranks, each in a thread of its own."""
    start = uuid.uuid4().hex[:8]

    def save(rank: int) -> Manifest | None:
        facts = replace(FACTS, step=step, attempt=attempt, world_size=world_size)
        return checkpoints.save_share(tensors_of(step), facts, Share(rank, world_size, start), 20)

    with ThreadPoolExecutor(world_size) as pool:
        first, *others = pool.map(save, range(world_size))
    assert others == [None] * (world_size - 1)
    assert first is not None
    return first


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(stream, "PART_BYTES", 5 * MIB)


# ── Who writes what ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_shares_are_whole_tensors_each_once_and_about_equal(world_size):
    dice = random.Random(world_size)
    sizes = {f"t{number}": int(dice.paretovariate(0.8) * 1000) % 10**6 for number in range(200)}
    state = {name: torch.empty(size, dtype=torch.int16, device="meta") for name, size in sizes.items()}
    shares = [Share(rank, world_size, START).of(state) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(state)
    assert all(share[name] is state[name] for share in shares for name in share)
    loads = [sum(2 * sizes[name] for name in share) for share in shares]
    # No schedule that gives the next one to whoever has least can be further from the mean.
    assert max(loads) <= sum(loads) / world_size + 2 * max(sizes.values())
    # And the longest come first: ones that are there already would leave no even place for a two.
    small = {name: torch.empty(size, device="meta") for name, size in {"a": 1, "b": 1, "c": 2}.items()}
    assert [set(Share(rank, 2, START).of(small)) for rank in range(2)] == [{"c"}, {"a", "b"}]
    shuffled = dict(dice.sample(list(state.items()), len(state)))  # each rank may have its own order
    assert [Share(rank, world_size, START).of(shuffled).keys() for rank in range(world_size)] == [
        share.keys() for share in shares
    ]


def test_ranks_share_the_parts_that_one_manifest_can_hold(monkeypatch):
    monkeypatch.setattr("jebm.store.checkpoint.MOST_PARTS", 2)
    checkpoints = memory_checkpoints()
    manifest = save_sharded(checkpoints, 1)
    assert [(stored.part_size, len(stored.crc32)) for stored in manifest.objects] == [(10 * MIB, 1)] * 2
    assert is_whole(checkpoints, manifest)


def test_a_rank_touches_no_tensor_of_another_share(caplog):
    """The other's has 4 TB: neither a buffer nor an upload of it is possible."""
    checkpoints = memory_checkpoints()
    state = {"mine": torch.arange(5), "of the other": torch.zeros(1).expand(1 << 40)}
    writer = AsyncWriter(checkpoints, keep_last=1, like=state, share=Share(1, 2, START))
    writer.submit(state, replace(FACTS, step=1))
    state["mine"] += 1
    writer.submit(state, replace(FACTS, step=2))
    writer.close()
    assert (writer.stats.committed, writer.stats.failures) == (2, 0)
    assert writer.last_committed is None  # that is for rank 0 to say
    assert caplog.text == ""  # the first buffer was made ready, too
    assert [found.status for found in checkpoints.list()] == ["partial", "partial"]


# ── Two processes, and a server ─────────────────────────────────────────────────────────────────────────

# Starts a process for each line "ENDPOINT URI RANK STEP PATIENCE", and says its number; waits for the one of
# a line "wait NUMBER", and says its exit code: 0 saved, 3 refused or too late.
RANKS = """
import os, sys, torch
from jebm.errors import JebmError
from jebm.store import stream
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.sealed import sealed
from jebm.store.shares import Share
from jebm.store.storage import open_store
stream.PART_BYTES = 5 << 20
torch.set_num_threads(1)
MIB = 1 << 20
for line in sys.stdin:
    words = line.split()
    if words[0] == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(words[1]), 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    os.environ["AWS_ENDPOINT_URL"], uri, rank, step, patience = words
    generator = torch.Generator().manual_seed(int(step))
    sizes = {"model.a": 6 * MIB, "model.b": 4 * MIB, "ema.a": 2 * MIB, "ema.b": MIB, "odd": 17, "empty": 0}
    state = {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for name, size in sizes.items()
    }
    state["step"] = torch.tensor(int(step))
    facts = Facts(
        step=int(step), attempt=1, state={"position": 64}, config={}, metrics={"loss": 1.0},
        provenance={}, world_size=2, parent=None,
    )
    try:
        share = Share(int(rank), 2, "5ca1ab1e")
        Checkpoints(open_store(uri), "run").save_share(state, facts, share, float(patience))
    except JebmError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)
    os._exit(0)
"""


class Ranks:
    """Processes that write shares; the imports are done once, and each is a fork."""

    def __init__(self, errors: Path) -> None:
        self._errors = errors
        with errors.open("w") as file:
            self._parent = subprocess.Popen(
                [sys.executable, "-c", RANKS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "PYTHONPATH": str(PLATFORM)},
            )

    def _ask(self, line: str) -> int:
        self._parent.stdin.write(f"{line}\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def begin(self, uri: str, rank: int, step: int, patience: float = 20) -> int:
        return self._ask(f"{os.environ['AWS_ENDPOINT_URL']} {uri} {rank} {step} {patience}")

    def code(self, process: int) -> int:
        return self._ask(f"wait {process}")

    def errors(self) -> str:
        return self._errors.read_text()

    def end(self) -> None:
        self._parent.kill()
        self._parent.communicate()


@pytest.fixture(scope="module")
def ranks(s3, tmp_path_factory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks") / "errors")
    yield started
    started.end()


def test_two_processes_write_what_one_would(s3_uri, ranks):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    writers = [ranks.begin(s3_uri, rank, step=2) for rank in (1, 0)]
    alone = checkpoints.save(tensors_of(1), replace(FACTS, step=1, world_size=1))
    assert [ranks.code(writer) for writer in writers] == [0, 0], ranks.errors()
    manifest = checkpoints.latest()
    assert (manifest.step, manifest.world_size, len(manifest.objects)) == (2, 2, 2)
    assert checkpoints.latest(deep=True) == manifest
    assert is_whole(checkpoints, manifest)
    assert is_whole(checkpoints, alone)
    folder = open_store(s3_uri).child(f"run/checkpoints/{manifest.name}")
    assert {info.key for info in folder.list()} == {"MANIFEST.json", *(one.key for one in manifest.objects)}
    # Each object is a file that any reader opens, and all together are the state.
    files = [safetensors.torch.load(folder.get(stored.key)) for stored in manifest.objects]
    assert equal({**files[0], **files[1]}, tensors_of(2))
    assert not files[0].keys() & files[1].keys()
    assert [len(stored.crc32) for stored in manifest.objects] == [2, 2]  # 7 and 6 MiB
    # What is not the tensors is as one rank would have said it.
    assert replace(manifest, step=1, created=alone.created, objects=(), world_size=1) == replace(
        alone, objects=()
    )


def test_a_rank_killed_in_mid_upload_leaves_the_checkpoint_before(proxy, s3_uri, ranks):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    first = save_sharded(checkpoints, 1)
    reached = threading.Event()

    def strike(_method, path):
        if "data/r00001-" in path and "partNumber=2" in path:
            reached.set()
            return "stall"
        return None

    proxy.fault = strike
    main, other = (ranks.begin(s3_uri, rank, step=2, patience=1) for rank in (0, 1))
    assert reached.wait(300)
    os.kill(other, signal.SIGKILL)
    assert (ranks.code(main), ranks.code(other)) == (3, -signal.SIGKILL)
    assert "no share of rank 1 for" in ranks.errors()
    proxy.fault = lambda *_: None
    assert [found.status for found in checkpoints.list()] == ["partial", "committed"]
    assert checkpoints.latest() == first
    assert is_whole(checkpoints, first)
    again = save_sharded(checkpoints, 2, attempt=checkpoints.next_attempt())
    assert checkpoints.latest() == again
    assert is_whole(checkpoints, again)
    assert checkpoints.orphans(-60) == ["step-00000002-a0001"]


STAGES = {
    "in its share": ("PUT", "partNumber=2", "stall"),
    "while it waits": ("GET", "shares", None),
    "before the manifest": ("PUT", "MANIFEST.json", "stall"),
    "after the manifest": ("PUT", "MANIFEST.json", "hush"),
}


def test_rank_0_killed_at_any_stage_leaves_nothing_or_all(proxy, s3_uri, ranks):
    for number, (stage, (method, name, fault)) in enumerate(STAGES.items()):
        uri = f"{s3_uri}/{number}"
        checkpoints = Checkpoints(open_store(uri), "run")
        first = checkpoints.save(tensors_of(1), replace(FACTS, step=1))
        reached = proxy.hushed = threading.Event()

        def strike(seen_method, path, method=method, name=name, fault=fault, reached=reached):
            if seen_method != method or name not in path or "r00001" in path:
                return None
            if fault != "hush":  # else when the server has done it
                reached.set()
            return fault

        proxy.fault = strike
        main = ranks.begin(uri, 0, step=2)
        if name != "shares":
            other = ranks.begin(uri, 1, step=2)
        assert reached.wait(300), stage
        os.kill(main, signal.SIGKILL)
        if name == "shares":
            other = ranks.begin(uri, 1, step=2)
        assert (ranks.code(main), ranks.code(other)) == (-signal.SIGKILL, 0), stage
        proxy.fault = lambda *_: None
        latest = checkpoints.latest()
        assert latest.step == (2 if stage == "after the manifest" else 1), stage
        assert is_whole(checkpoints, latest), stage
        assert is_whole(checkpoints, first), stage


# ── What does not become a checkpoint ───────────────────────────────────────────────────────────────────


def test_what_is_missing_is_waited_for_and_then_named(caplog):
    checkpoints = memory_checkpoints()
    first = save_sharded(checkpoints, 1, world_size=9)
    for rank in (2, 4):
        assert checkpoints.save_share(tensors_of(2), replace(FACTS, step=2), Share(rank, 9, START), 0) is None
    with pytest.raises(StoreError, match="no share of rank 1, 3, 5, 6, 7 and 1 more for 0 s"):
        checkpoints.save_share(tensors_of(2), replace(FACTS, step=2), Share(0, 9, START), 0)
    assert checkpoints.latest() == first
    # As long as one after the other comes, there is no hurry.
    writer = AsyncWriter(checkpoints, keep_last=9, patience_seconds=2, share=Share(0, 4, START))
    writer.submit(tensors_of(3), replace(FACTS, step=3, world_size=4))
    for rank in range(1, 4):
        time.sleep(0.9)
        checkpoints.save_share(tensors_of(3), replace(FACTS, step=3), Share(rank, 4, START), 0)
    writer.close()
    assert is_whole(checkpoints, writer.last_committed)


def test_shares_of_another_start_are_not_taken():
    """Two drivers that began at once have one attempt number: the second one's ranks must not mix in."""
    checkpoints = memory_checkpoints()
    facts = replace(FACTS, step=1)
    other = {name: tensor + 1 for name, tensor in tensors_of(1).items()}
    checkpoints.save_share(other, facts, Share(1, 2, "0" * 8), 0)
    with pytest.raises(StoreError, match="no share of rank 1"):
        checkpoints.save_share(tensors_of(1), facts, Share(0, 2, START), 0)
    # Of the two the first that commits wins, and the second takes its data away.
    checkpoints.save_share(tensors_of(1), facts, Share(1, 2, START), 0)
    manifest = checkpoints.save_share(tensors_of(1), facts, Share(0, 2, START), 0)
    before = {info.key for info in open_store(checkpoints._store.uri).list()}
    with pytest.raises(FencedError, match="another writer"):
        checkpoints.save_share(other, facts, Share(0, 2, "0" * 8), 0)
    assert {info.key for info in open_store(checkpoints._store.uri).list()} < before
    assert checkpoints.latest() == manifest
    assert is_whole(checkpoints, manifest)


def test_an_older_attempt_takes_all_shares_back():
    checkpoints = memory_checkpoints()
    newer = save_sharded(checkpoints, 1, attempt=2)
    with pytest.raises(FencedError, match="attempt 2 of this run has begun since"):
        save_sharded(checkpoints, 5, attempt=1)
    assert [found.name for found in checkpoints.list()] == [newer.name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("odd"), "odd is missing in the checkpoint"),
        (lambda state: state.update(more=torch.zeros(3)), "more is only in the checkpoint"),
        (lambda state: state.update(odd=torch.zeros(17)), "odd is torch.float32"),
        # Another balance: what both believe to be their own is there twice, the rest nowhere.
        (lambda state: state.update(step=torch.zeros(2 * KIB, dtype=torch.int64)), "is in another object"),
    ],
)
def test_ranks_that_disagree_commit_nothing(change, words):
    checkpoints = memory_checkpoints()
    state = tensors_of(1, KIB)
    assert "odd" in Share(1, 2, START).of(state)
    change(state)
    checkpoints.save_share(state, replace(FACTS, step=1), Share(1, 2, START), 0)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.save_share(tensors_of(1, KIB), replace(FACTS, step=1), Share(0, 2, START), 0)
    assert checkpoints.latest() is None


RECORDS = {
    "no JSON": lambda _: b"\x80\x04\x95",
    "a list": lambda _: b"[]",
    "deep": lambda _: b"[" * 100_000,
    "huge": lambda _: b" " * (MIB + 1),
    "no object": lambda record: record | {"object": None},
    "more": lambda record: record | {"more": 1},
    "format": lambda record: record | {"format": "jebm-checkpoint"},
    "version": lambda record: record | {"version": 3},
    "another checkpoint": lambda record: record | {"checkpoint": "step-00000001-a0002"},
    "another start": lambda record: record | {"start": "0" * 8},
    "another rank": lambda record: record | {"rank": 0},
    "another world": lambda record: record | {"world_size": 3},
    "another's object": lambda record: changed(record, key="data/r00000-00000000.safetensors"),
    "path escape": lambda record: changed(record, key="data/../../../other/r00001-00000000.safetensors"),
    "absurd size": lambda record: changed(record, size=10**18),
    "too few CRC32s": lambda record: changed(record, crc32=[]),
    "another size": lambda record: changed(record, size=record["object"]["size"] - 1),
}


def changed(record, **fields):
    return record | {"object": record["object"] | fields}


@pytest.mark.parametrize("what", RECORDS)
def test_a_hostile_record_commits_nothing(what):
    store = open_store(f"memory://{uuid.uuid4().hex}")
    checkpoints = Checkpoints(store, "run")
    share = Share(1, 2, START)
    checkpoints.save_share(tensors_of(1, KIB), replace(FACTS, step=1), share, 0)
    key = f"run/checkpoints/step-00000001-a0001/{share.key}"
    record = json.loads(store.get(key))
    del record["sha256"]
    spoiled = RECORDS[what](record)
    store.put(key, spoiled if isinstance(spoiled, bytes) else sealed(spoiled))
    # What is huge is not even read.
    words = {"huge": f"the record of rank 1 has {MIB + 1} bytes", "another size": "is damaged"}
    with pytest.raises(CheckpointError, match=words.get(what, "the record of rank 1 cannot be read")):
        checkpoints.save_share(tensors_of(1, KIB), replace(FACTS, step=1), Share(0, 2, START), 0)
    assert checkpoints.latest() is None


def test_records_that_cannot_be_deleted_harm_nobody(proxy, s3_uri, caplog):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    proxy.fault = lambda method, path: "expired" if method == "POST" and "delete" in path else None
    manifest = save_sharded(checkpoints, 1)
    assert "records of shares are left" in caplog.text
    proxy.fault = lambda *_: None
    assert checkpoints.latest() == manifest
    assert is_whole(checkpoints, manifest)
    save_sharded(checkpoints, 2)
    assert checkpoints.prune(1, None, ()) == [manifest.name]
    assert not list(open_store(s3_uri).list(f"run/checkpoints/{manifest.name}"))


# ── Back again ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("world_size", [2, 5])
def test_all_that_reads_checkpoints_reads_these(tmp_path, world_size):
    run = open_run(str(tmp_path / "runs" / "run"))
    alone = run.checkpoints.save(tensors_of(7), replace(FACTS, step=6, world_size=1))
    manifest = save_sharded(run.checkpoints, 7, world_size)
    assert len(manifest.objects) == world_size
    assert run.choose() == run.choose(step=7) == run.choose(best="loss") == manifest
    assert run.checkpoints.find(manifest.name).status == "committed"
    table = tensor_table(run.folder(manifest.name), manifest)
    assert {name: entry.shape for name, entry in table.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors_of(7).items()
    }
    assert compare(run, manifest, manifest).bytes_read == 0
    for one, other in ((alone, manifest), (manifest, alone)):
        found = compare(run, one, other)
        assert (found.changed, found.added, found.removed, found.equal) == ((), (), (), 7)
    with pytest.MonkeyPatch.context() as patch:  # room for the largest of the objects
        free = max(stored.size for stored in manifest.objects)
        patch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
        with pytest.raises(StoreError, match="bytes do not fit into the"):
            download(run, manifest, tmp_path / "here", lambda *_: None)
    seen: list[int] = []
    done = download(run, manifest, tmp_path / "here", lambda count, _total: seen.append(count))
    size = sum(stored.size for stored in manifest.objects)
    assert (done.bytes_fetched, done.bytes_kept, sum(seen)) == (size, 0, size)
    here = open_run(str(tmp_path / "here" / "run"))
    assert is_whole(here.checkpoints, here.choose())
    path = done.folder / manifest.objects[-1].key
    path.write_bytes(path.read_bytes()[:-1])
    assert here.checkpoints.list()[0].status == "corrupt"
    assert "bytes instead of" in damages(here.folder(manifest.name), manifest.objects)[0]
    done = download(run, manifest, tmp_path / "here", lambda *_: None)
    assert 0 < done.bytes_fetched < size
    assert is_whole(here.checkpoints, here.choose())
    names = ("model.a", "model.b")
    assert equal(read_tensors(run, manifest, names), {name: tensors_of(7)[name] for name in names})
    assert run.checkpoints.prune(1, None, ()) == [alone.name]
    save_sharded(run.checkpoints, 8, world_size)
    assert run.checkpoints.prune(1, None, ()) == [manifest.name]
    assert not list(run.folder(manifest.name).list())


def test_a_damaged_share_leads_back_to_the_checkpoint_before(caplog):
    store = open_store(f"memory://{uuid.uuid4().hex}")
    checkpoints = Checkpoints(store, "run")
    first, second = save_sharded(checkpoints, 1), save_sharded(checkpoints, 2)
    folder = store.child(f"run/checkpoints/{second.name}")
    key = second.objects[1].key
    data = bytearray(folder.get(key))
    data[-1] ^= 1
    folder.put(key, bytes(data))
    assert checkpoints.latest() == first
    with pytest.raises(CheckpointError, match=r"r00001-.* does not match its CRC32"):
        restored(checkpoints, second)
    folder.delete([key])
    assert checkpoints.latest() == first
    with pytest.raises(CheckpointError, match="is gone"):
        restored(checkpoints, second)


def test_what_does_not_fit_is_found_before_any_object_is_read():
    checkpoints = memory_checkpoints()
    manifest = save_sharded(checkpoints, 1, world_size=3)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}
    into["more"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="more is missing in the checkpoint"):
        checkpoints.load(manifest, into)
    assert not any(tensor.any() for tensor in into.values())
