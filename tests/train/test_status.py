"""How runs stand, told by their storages: by lease, run.json, journal and checkpoints, whole or damaged."""

import json
import os
import sys
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from jebm.commands import run_command
from jebm.commands.status import doing
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.storage import Store, open_store
from jebm.train.heartbeat import Heartbeat, Note
from jebm.train.lease import Lease
from jebm.train.status import run_status

FACTS = Facts(step=0, attempt=1, state={}, config={}, metrics={}, provenance={}, world_size=1, parent=None)


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}/runs" if request.param == "memory" else str(tmp_path))


def save(store: Store, name: str, step: int) -> None:
    Checkpoints(store, name).save({"model.x": torch.ones(3)}, replace(FACTS, step=step))


def journal(store: Store, name: str, *rows: str, total_steps: int | None = 40) -> None:
    """Write what rank 0 writes of a run."""
    attempt = {"started": "2026-01-01T00:00:00Z", "from_step": 0}
    if total_steps is not None:
        attempt["total_steps"] = total_steps
    store.put(f"{name}/run.json", json.dumps({"attempts": [attempt]}).encode())
    if rows:
        store.put(f"{name}/metrics.jsonl", "\n".join(rows).encode())


def beat(store: Store, name: str, *, hung: bool = False) -> None:
    """Write what rank 0 writes of the ranks."""
    ranks = [Note(0, "w1", 7, 21, "update", busy=False), Note(1, "w2", 8, 21, "images", busy=False)]
    store.put(f"{name}/heartbeat.json", Heartbeat.encoded(ranks, hung=hung))


def test_a_run_is_running_while_its_lease_is_renewed_and_stopped_after_it(store: Store) -> None:
    journal(store, "mine", '{"step": 10, "loss": 3.5}', '{"step": 20, "loss": 2.5}', '{"step": 30, "lo')
    save(store, "mine", 10)
    with Lease(store.child("mine")):
        assert run_status(store, "mine").state == "waiting"  # for its workers
        beat(store, "mine")
        status = run_status(store, "mine")
        assert (status.state, status.step, status.total_steps) == ("running", 20, 40)
        assert status.holder is not None
        assert status.holder.description.startswith(f"process {os.getpid()} on host ")
        assert status.checkpoint == "step-00000010-a0001"
        assert status.metrics == {"loss": 2.5}  # half a row at the end is being written
    assert run_status(store, "mine").state == "stopped"


def test_a_run_with_its_last_step_saved_is_finished(store: Store) -> None:
    journal(store, "mine", '{"step": 40, "loss": 3.5}')
    with Lease(store.child("mine")):
        pass
    save(store, "mine", 39)
    assert run_status(store, "mine").state == "stopped"
    save(store, "mine", 40)
    assert run_status(store, "mine").state == "finished"
    journal(store, "mine", total_steps=None)  # of an older version
    status = run_status(store, "mine")
    assert (status.state, status.step, status.total_steps) == ("stopped", 40, None)


def test_a_job_that_has_been_silent_for_a_minute_is_dead(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    journal(store, "mine")
    lease = Lease(store.child("mine"), beat_seconds=1000)
    lease.__enter__()
    (path,) = tmp_path.glob("mine/lease/*.json")
    beat(store, "mine")
    assert run_status(store, "mine").state == "running"
    os.utime(path, (time.time() - 61, time.time() - 61))
    status = run_status(store, "mine")
    assert status.state == "dead"
    assert status.holder is not None
    assert 60 < (datetime.now(UTC) - status.holder.renewed).total_seconds() < 90
    lease.__exit__(None, None, None)


def test_a_job_that_lives_may_hang_or_wait_for_its_workers(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    journal(store, "mine")
    with Lease(store.child("mine")):
        beat(store, "mine", hung=True)
        status = run_status(store, "mine")
        assert status.state == "hung"
        assert doing(status.heartbeat).startswith("2; rank 1 on w2 (pid 8): images of step 22, ")
        beat(store, "mine")
        os.utime(tmp_path / "mine/heartbeat.json", (time.time() - 61, time.time() - 61))
        assert run_status(store, "mine").state == "waiting"
        store.put("mine/heartbeat.json", b'{"hung": false, "ranks": [{"rank": "none"}]}')
        assert run_status(store, "mine").state == "waiting"


def test_damaged_records_count_as_missing(store: Store) -> None:
    journal(store, "mine")
    store.put("mine/run.json", b"{")
    store.put("mine/metrics.jsonl", b"\xff\n[1]\n")
    store.put("mine/lease/00000007.json", b"who?")
    save(store, "mine", 3)
    store.put("mine/checkpoints/step-00000003-a0001/MANIFEST.json", b"{}")
    status = run_status(store, "mine")
    assert (status.state, status.step, status.total_steps, status.checkpoint) == ("waiting", 0, None, None)
    assert status.holder is not None
    assert "cannot be read" in status.holder.description
    assert status.metrics == {}
    assert str(status.damage).startswith(f"{store.uri}/mine/run.json: is damaged (")
    journal(store, "mine")
    assert run_status(store, "mine").damage is None


def test_the_command_tells_a_run_and_lets_nothing_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path))
    journal(store, "mine", json.dumps({"step": 7, "a\x1b[2J\nb": 1.5, "none": None}))
    save(store, "mine", 5)

    def status(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["jebm", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_command("status")
        return caught.value.code, *capsys.readouterr()

    code, out, _ = status(str(tmp_path / "mine"))
    assert code == 0
    assert "state       unknown, step 7 of 40\n" in out
    assert "checkpoint  step-00000005-a0001, " in out
    assert "\n  a\\x1b[2J\\nb  1.5\n  none         -\n" in out
    document = json.loads(status(str(tmp_path / "mine"), "--json")[1])
    assert document["checkpoint"] == "step-00000005-a0001"
    store.put("spoilt/run.json", b"[")
    assert "\nstate       unknown, step 0; file://" in (out := status(str(tmp_path / "spoilt"))[1])
    assert "spoilt/run.json: is damaged (" in out.splitlines()[1]
    store.delete(["spoilt/run.json"])
    journal(store, "odd", '{"step": 1, "loss": 1' + "0" * 400 + "}")
    assert status(str(tmp_path / "odd"))[0] == 0
    journal(store, "sweep/trials/00003", '{"step": 4}')
    store.put("sweep/sweep.json", b"{}")
    store.put("sweep/lease/00000001.json", b"{}")  # a sweep's own, with no run in its place
    listed = [line.split()[0] for line in status(str(tmp_path))[1].splitlines()]
    assert (listed[0], listed[-1]) == ("run", "none")  # none has the metric distortion
    assert sorted(listed[1:-1]) == ["mine", "odd", "sweep"]
    assert status(str(tmp_path / "sweep"))[1].splitlines()[1].startswith("trials/00003  unknown ")
    code, out, err = status(str(tmp_path / "nothing"))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
