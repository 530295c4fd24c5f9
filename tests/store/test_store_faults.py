"""What goes wrong between a writer and its storage. Each ends with the same bits, or with nothing to see.

The server is the real one; the proxy does to the requests what networks do. A state is cut into small
parts, so that most of its requests are parts.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boto3.session import Session

from jebm.errors import CheckpointError
from jebm.store import stream
from jebm.store.checkpoint import Checkpoints, Facts, FencedError, Manifest
from jebm.store.storage import AccessDeniedError, EndpointError, open_store
from jebm.store.writer import PATIENCE_SECONDS, AsyncWriter

PLATFORM = Path(__file__).parents[2] / "platform"
MIB = 1 << 20
FACTS = Facts(
    step=0,
    attempt=1,
    state={"position": 64},
    config={},
    metrics={},
    provenance={},
    world_size=1,
    parent=None,
)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """21 MiB, 5 parts."""
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.randint(-(2**31), 2**31 - 1, (5, MIB), dtype=torch.int32, generator=generator),
        "odd": torch.randint(0, 255, (MIB + 1,), dtype=torch.uint8, generator=generator),
        "step": torch.tensor(step),
    }


def save(checkpoints: Checkpoints, step: int, **changed) -> Manifest:
    return checkpoints.save(tensors_of(step), replace(FACTS, step=step, **changed))


def is_whole(checkpoints: Checkpoints, manifest: Manifest) -> bool:
    """Whether what comes back is, bit for bit, what was saved."""
    want = tensors_of(manifest.step)
    into = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
    checkpoints.load(manifest, into)
    return all(torch.equal(into[name], want[name]) for name in want)


def checkpoints_at(uri: str) -> Checkpoints:
    return Checkpoints(open_store(uri), "run")


def message_of(error: pytest.ExceptionInfo) -> str:
    """The message, which is one line and holds no secret."""
    text = str(error.value)
    assert "\n" not in text
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text
    return text


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(stream, "PART_BYTES", 5 * MIB)


class Now:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


# ── The network ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["busy", "reset", "lose"])
def test_when_every_fourth_request_fails_only_time_is_lost(proxy, s3_uri, fault):
    checkpoints = checkpoints_at(s3_uri)
    first = save(checkpoints, 1)
    dice, struck = random.Random(7), []

    def strike(method, path):
        if dice.random() < 0.25:
            struck.append(f"{method} {path}")
            return fault
        return None

    proxy.fault = strike
    second = save(checkpoints, 2)
    assert checkpoints.latest() == second
    assert is_whole(checkpoints, second)
    assert is_whole(checkpoints, first)
    assert len(struck) > 5
    proxy.fault = lambda *_: None
    assert [found.status for found in checkpoints.list()] == ["committed", "committed"]


@pytest.mark.parametrize("fault", ["reset", "cut", "flip", "garble"])
def test_a_part_that_breaks_in_the_middle_is_sent_again(proxy, s3_uri, fault):
    checkpoints = checkpoints_at(s3_uri)
    struck = set()

    def strike(method, path):
        where = next((name for name in ("partNumber=2", "partNumber=4", "list-type") if name in path), method)
        if method in ("GET", "PUT") and where not in struck and not path.endswith(".json"):
            struck.add(where)
            return fault if "list-type" not in where or fault != "flip" else None
        return None

    proxy.fault = strike
    manifest = save(checkpoints, 1)
    assert checkpoints.latest() == manifest
    assert is_whole(checkpoints, manifest)
    assert {"partNumber=2", "partNumber=4", "list-type", "GET"} <= struck


def test_a_silent_connection_is_given_up_and_made_anew(proxy, s3_uri, monkeypatch):
    monkeypatch.setattr("jebm.store.s3_session._READ_TIMEOUT_SECONDS", 1.0)
    checkpoints = checkpoints_at(s3_uri)
    silent = {"partNumber=2": "stall", "partNumber=4": "hush", "MANIFEST.json": "hush", "list-type": "stall"}

    def strike(_method, path):
        return next((silent.pop(name) for name in list(silent) if name in path), None)

    proxy.fault = strike
    now = Now()
    manifest = save(checkpoints, 1)
    assert checkpoints.latest() == manifest
    assert not silent
    silent["safetensors"] = "stall"
    assert is_whole(checkpoints, manifest)
    assert not silent
    assert now.seconds < 120  # less than 45 s for each, after which any request is cut off


def test_a_server_that_stays_silent_is_named_in_time(proxy, s3_uri, monkeypatch):
    monkeypatch.setattr("jebm.store.s3_session._READ_TIMEOUT_SECONDS", 1.0)
    checkpoints = checkpoints_at(s3_uri).patient(2)
    proxy.fault = lambda *_: "stall"
    now = Now()
    with pytest.raises(EndpointError) as caught:
        checkpoints.latest()
    assert proxy.url in message_of(caught)
    assert now.seconds < 30  # patience and two timeouts, and not the 45 s that any request may take


def test_a_server_that_does_not_even_read_is_named_in_time(s3_uri, monkeypatch):
    monkeypatch.setattr("jebm.store.s3_session._READ_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr("jebm.store.s3_session._CONNECT_TIMEOUT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as deaf:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        store = open_store(s3_uri).patient(1)
        now = Now()
        with pytest.raises(EndpointError):
            store.put("a", bytes(16 * MIB))
        # Patience, two timeouts, and a second per attempt in which the client waits for a "100 Continue".
        assert now.seconds < 30


# ── The client dies ─────────────────────────────────────────────────────────────────────────────────────

SAVES_IN_A_CHILD = """
import os, sys, torch
from jebm.store import stream
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.storage import open_store
stream.PART_BYTES = 5 << 20
torch.set_num_threads(1)
for line in sys.stdin:
    uri = line.strip()
    child = os.fork()
    if child == 0:
        generator = torch.Generator().manual_seed(2)
        tensors = {
            "w": torch.randint(-(2**31), 2**31 - 1, (5, 1 << 20), dtype=torch.int32, generator=generator),
            "odd": torch.randint(0, 255, ((1 << 20) + 1,), dtype=torch.uint8, generator=generator),
            "step": torch.tensor(2),
        }
        keywords = dict(state={}, config={}, metrics={}, provenance={}, world_size=1, parent=None)
        Checkpoints(open_store(uri), "run").save(tensors, Facts(step=2, attempt=1, **keywords))
        os._exit(0)
    print(child, flush=True)
"""
STAGES = {
    "before data": ("POST", "?uploads", "stall"),
    "in data": ("PUT", "partNumber=3", "stall"),
    "after data": ("POST", "uploadId=", "hush"),
    "before manifest": ("PUT", "MANIFEST.json", "stall"),
    "after manifest": ("PUT", "MANIFEST.json", "hush"),
}


def test_a_writer_killed_at_any_stage_leaves_nothing_or_all(proxy, s3_uri, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PLATFORM))
    for stage in STAGES:
        save(checkpoints_at(f"{s3_uri}/{stage.replace(' ', '-')}"), 1)
    command = [sys.executable, "-c", SAVES_IN_A_CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        for stage, (method, name, fault) in STAGES.items():
            uri = f"{s3_uri}/{stage.replace(' ', '-')}"
            reached = proxy.hushed = threading.Event()

            def strike(seen_method, path, method=method, name=name, fault=fault, reached=reached):
                if seen_method != method or name not in path:
                    return None
                if fault != "hush":  # else when the server has done it
                    reached.set()
                return fault

            proxy.fault = strike
            parent.stdin.write(f"{uri}\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            assert reached.wait(300), stage
            os.kill(child, signal.SIGKILL)
            proxy.fault = lambda *_: None
            checkpoints = checkpoints_at(uri)
            latest = checkpoints.latest()
            assert latest.step == (2 if stage == "after manifest" else 1), stage
            assert is_whole(checkpoints, latest), stage
            assert is_whole(checkpoints, checkpoints.list()[-1].manifest), stage
            # The next attempt goes on, and meets nothing of the dead one.
            third = save(checkpoints, 3, attempt=checkpoints.next_attempt())
            assert is_whole(checkpoints, third), stage
        parent.stdin.close()


# ── The server dies ─────────────────────────────────────────────────────────────────────────────────────


def kill(s3) -> str:
    """Kill the server, as a power cut would; returns its port."""
    port = s3.environment()["AWS_ENDPOINT_URL"].rpartition(":")[2]
    process = int((s3.folder / "server.pid").read_text())
    os.kill(process, signal.SIGKILL)
    ports = json.loads((s3.folder / "ports.json").read_text()).values()
    while not all(is_free(number + shift) for number in ports for shift in (0, 10_000)):
        time.sleep(0.02)
    return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def restart(s3, port: str) -> None:
    started = s3.run("start", "--port", port)
    assert started.returncode == 0, started.stderr


def test_a_server_killed_in_mid_upload_comes_back_and_the_save_goes_on(proxy, s3, s3_uri):
    checkpoints = checkpoints_at(s3_uri).patient(PATIENCE_SECONDS)
    first = save(checkpoints, 1)
    killed: list[str] = []

    def strike(_method, path):
        if "partNumber=3" in path and not killed:
            killed.append(kill(s3))

    proxy.fault = strike
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(save, checkpoints, 2)
        while not killed:
            time.sleep(0.01)
        restart(s3, killed[0])
        second = saving.result(timeout=300)
    assert checkpoints.latest() == second
    assert is_whole(checkpoints, second)
    assert is_whole(checkpoints, first)


def test_training_goes_on_through_an_outage_and_nothing_is_lost(s3, s3_uri):
    checkpoints = checkpoints_at(s3_uri)
    writer = AsyncWriter(checkpoints, keep_last=9)
    tensors = tensors_of(1)
    writer.submit(tensors, replace(FACTS, step=1))
    assert writer.drain(300)
    port = kill(s3)
    now = Now()
    steps = 0
    while steps < 50 or now.seconds < 9:  # the server comes back after them: no step can have waited for it
        for tensor in tensors.values():
            tensor.add_(1)  # what is in the buffers must not see it
        if steps in (10, 20):
            for name, tensor in tensors_of(steps).items():
                tensors[name].copy_(tensor)
            writer.submit(tensors, replace(FACTS, step=steps))
        steps += 1
        time.sleep(0.05)
    restart(s3, port)
    assert writer.drain(300)
    writer.close()
    assert (writer.stats.committed, writer.stats.failures) == (3, 0)
    assert [found.step for found in checkpoints.list()] == [20, 10, 1]
    assert all(is_whole(checkpoints, found.manifest) for found in checkpoints.list())


def test_a_background_save_waits_for_the_storage_as_long_as_it_is_told(s3_uri, monkeypatch, caplog):
    assert PATIENCE_SECONDS >= 60
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is there
    writer = AsyncWriter(checkpoints_at(s3_uri), keep_last=1, tolerate_failures=0, patience_seconds=3)
    now = Now()
    writer.submit({"w": torch.ones(1)}, replace(FACTS, step=1))
    assert writer.drain(30)
    assert now.seconds > 1
    with pytest.raises(EndpointError, match="no good answer"):
        writer.close()
    assert "the checkpoint of step 1 was not saved" in caplog.text


# ── What lies there is damaged ──────────────────────────────────────────────────────────────────────────


def test_a_flipped_bit_is_found_even_under_a_forged_etag(s3_uri, caplog):
    store, checkpoints = open_store(s3_uri), checkpoints_at(s3_uri)
    first, second = save(checkpoints, 1), save(checkpoints, 2)
    (stored,) = second.objects
    folder = store.child(f"run/checkpoints/{second.name}")
    data = bytearray(folder.get(stored.key))
    data[len(data) // 3] ^= 8
    etag = folder.put(stored.key, bytes(data)).etag
    assert checkpoints.latest() == first  # another etag: read, and found damaged
    folder.put("MANIFEST.json", replace(second, objects=(replace(stored, etag=etag),)).encode())
    forged = checkpoints.latest()
    assert forged.step == 2
    with pytest.raises(CheckpointError, match="does not match its CRC32"):
        is_whole(checkpoints, forged)
    assert checkpoints.latest(deep=True) == first
    assert is_whole(checkpoints, first)


@pytest.mark.parametrize("what", ["object", "manifest"])
def test_what_is_missing_or_cut_off_leads_back_to_the_checkpoint_before(s3_uri, what):
    store, checkpoints = open_store(s3_uri), checkpoints_at(s3_uri)
    first, second = save(checkpoints, 1), save(checkpoints, 2)
    folder = store.child(f"run/checkpoints/{second.name}")
    if what == "object":
        folder.delete([second.objects[0].key])
        assert checkpoints.latest() == first
    else:
        whole = folder.get("MANIFEST.json")
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            folder.put("MANIFEST.json", whole[:size])
            assert checkpoints.latest() == first
    assert is_whole(checkpoints, first)


# ── Who may, and who was first ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("secret", "its secret key is wrong"),
        ("reader", "may not write here"),
        ("expired", "has expired; log in again (ExpiredToken)"),
    ],
)
def test_bad_credentials_end_a_save_at_once(proxy, s3, s3_uri, monkeypatch, spoil, words):
    first = save(checkpoints_at(s3_uri), 1)
    if spoil == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    elif spoil == "reader":
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        for name, value in (s3.environment("reader") | {"AWS_ENDPOINT_URL": endpoint}).items():
            monkeypatch.setenv(name, value)
    else:  # in the middle: a token that ends while the parts travel
        proxy.fault = lambda method, path: (
            "expired"
            if method == "DELETE" or ("partNumber=" in path and "partNumber=1&" not in path)
            else None
        )
    proxy.seen.clear()
    writer = AsyncWriter(checkpoints_at(s3_uri), keep_last=2, tolerate_failures=0)
    writer.submit(tensors_of(2), replace(FACTS, step=2))
    assert writer.drain(PATIENCE_SECONDS / 2)
    with pytest.raises(AccessDeniedError) as caught:
        writer.close()
    assert words in message_of(caught)
    assert len(proxy.seen) < 10  # one round of parts and the end of the upload, no retries
    monkeypatch.undo()
    checkpoints = checkpoints_at(s3_uri)
    assert checkpoints.latest() == first
    assert is_whole(checkpoints, first)


def test_of_sixteen_racing_commits_one_wins(s3_uri):
    store = open_store(s3_uri)
    start = threading.Barrier(16)

    def race(number: int) -> Manifest | FencedError:
        start.wait()
        try:
            checkpoints = Checkpoints(store, "run")
            return checkpoints.save({"w": torch.full((9,), number)}, replace(FACTS, step=1))
        except FencedError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(race, range(16)))
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Manifest)]
    assert len(winners) == 1
    into = {"w": torch.zeros(9, dtype=torch.int64)}
    Checkpoints(store, "run").load(Checkpoints(store, "run").latest(), into)
    assert torch.equal(into["w"], torch.full((9,), winners[0]))
    assert len(list(store.list())) == 2  # the others took their data away


def test_of_two_attempts_at_one_run_the_older_is_stopped(s3_uri):
    checkpoints = checkpoints_at(s3_uri)
    older = AsyncWriter(checkpoints, keep_last=9)
    older.submit({"w": torch.ones(1)}, replace(FACTS, step=1))
    older.drain()
    attempt = checkpoints.next_attempt()  # a second driver begins
    newer = AsyncWriter(checkpoints_at(s3_uri), keep_last=9)
    newer.submit({"w": torch.ones(1)}, replace(FACTS, step=1, attempt=attempt))
    newer.drain()
    older.submit({"w": torch.ones(1)}, replace(FACTS, step=2))
    older.drain()
    with pytest.raises(FencedError, match="attempt 2 of this run has begun since; stop one of the two jobs"):
        older.submit({"w": torch.ones(1)}, replace(FACTS, step=3))
    with pytest.raises(FencedError):
        older.close()
    newer.submit({"w": torch.ones(1)}, replace(FACTS, step=2, attempt=attempt))
    newer.close()
    names = [found.name for found in checkpoints.list()]
    assert names == ["step-00000002-a0002", "step-00000001-a0002", "step-00000001-a0001"]


# ── What the dead leave behind ──────────────────────────────────────────────────────────────────────────


def test_orphans_are_found_by_age_and_deleted(store, caplog):
    checkpoints = Checkpoints(store, "run")
    whole = checkpoints.save({"w": torch.ones(1)}, replace(FACTS, step=1))
    store.put("run/checkpoints/step-00000002-a0001/data/r00000-00000000.safetensors", b"left behind")
    store.put("run/checkpoints/step-00000003-a0002/data/r00000-00000000.safetensors", b"on its way")
    time.sleep(1.1)  # S3 tells whole seconds
    orphans = ["step-00000003-a0002", "step-00000002-a0001"]
    assert checkpoints.orphans(3600) == []
    assert checkpoints.orphans(0) == orphans
    assert checkpoints.delete_orphans(0) == orphans
    assert [(found.step, found.status) for found in checkpoints.list()] == [(1, "committed")]
    assert checkpoints.latest() == whole


def test_uploads_that_never_ended_are_given_up(s3, s3_uri, monkeypatch, caplog):
    trainer = dict(os.environ)
    client = Session().client("s3")
    prefix = s3_uri.removeprefix(s3.uri("")).strip("/")
    for key in ("run/checkpoints/step-00000001-a0001/data/x", "elsewhere/x"):
        client.create_multipart_upload(Bucket="jebm", Key=f"{prefix}/{key}")
    time.sleep(1.1)
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    assert checkpoints_at(s3_uri).delete_orphans(0) == []  # nothing to delete, and no right to give up others
    assert "left to the bucket's lifecycle rule" in caplog.text
    for name, value in trainer.items():
        monkeypatch.setenv(name, value)
    store = open_store(s3_uri)
    assert store.discard_unfinished(3600) == []
    assert store.child("run/checkpoints").discard_unfinished(0) == ["step-00000001-a0001/data/x"]
    assert store.discard_unfinished(0) == ["elsewhere/x"]
    assert store.discard_unfinished(0) == []


def test_a_local_upload_that_never_ended_is_given_up(tmp_path):
    store = open_store(str(tmp_path))
    store.put("a/b", b"1")
    (tmp_path / "a" / ".partial-0").write_bytes(b"half")
    assert store.discard_unfinished(3600) == []
    assert store.discard_unfinished(-1) == ["a/.partial-0"]
    assert [info.key for info in store.list()] == ["a/b"]
