"""The storage goes away for a minute while checkpoints are due: the run waits, and ends as if it had not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, tiny_config

from jebm.config import Config, config_to_dict
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.storage import open_store
from jebm.train.runtime import process_runtime
from jebm.train.state import TrainState

STEPS = 100
OUTAGE_SECONDS = 60
SILENT_SECONDS = 30  # of these: connections are taken and never answered; later they are refused


def tiny(storage: Path | str) -> Config:
    """100 steps with a checkpoint at every tenth: all that the outage stops, in some seconds of work."""
    return tiny_config(
        storage, train__epochs=4, train__ema_decay=0.9, checkpoint__every_steps=10, checkpoint__keep_last=20
    )


def command(config: Config, file: Path) -> list[str]:
    file.write_text(json.dumps(config_to_dict(config)))  # JSON is YAML
    return [sys.executable, "jobs/train.py", f"--config={file}"]


def checkpoints_of(config: Config) -> Checkpoints:
    return Checkpoints(open_store(config.run.storage), config.run.name)


def newest(config: Config) -> Manifest | None:
    return checkpoints_of(config).latest()


def saved(config: Config) -> dict[str, torch.Tensor]:
    """Return the tensors of the run's newest checkpoint."""
    manifest = newest(config)
    assert manifest is not None
    assert manifest.step == STEPS
    with process_runtime(config) as runtime:
        tensors = TrainState.build(config, runtime).tensors()
    checkpoints_of(config).load(manifest, tensors)
    return tensors


class Server:
    """An S3 server of this test's own, that may be frozen, killed and started again at the same port."""

    def __init__(self, server) -> None:  # type: ignore[no-untyped-def]
        self._server = server

    def start(self) -> None:
        started = self._server.run("start")
        assert started.returncode == 0, started.stderr

    def signal(self, number: signal.Signals) -> None:
        os.kill(int((self._server.folder / "server.pid").read_text()), number)


@pytest.fixture
def server(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:  # type: ignore[no-untyped-def]
    """Our own server, since it goes away; the environment of this process and its children points at it."""
    own = type(s3)(tmp_path / "s3")
    server = Server(own)
    server.start()
    for name, value in own.environment().items():
        monkeypatch.setenv(name, value)
    yield server
    server.signal(signal.SIGKILL)


@pytest.mark.long
def test_a_minute_without_storage_costs_a_minute_and_nothing_else(server: Server, tmp_path: Path) -> None:
    """First silence, then refused connections; the uninterrupted run has the processor in the meantime."""
    config, straight = tiny("s3://jebm/outage"), tiny(tmp_path / "straight")
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(command(config, tmp_path / "a.yaml"), cwd=ROOT, stdout=file, stderr=file) as run,
    ):
        try:
            deadline = time.monotonic() + 120
            while newest(config) is None:
                assert run.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            server.signal(signal.SIGSTOP)
            began = time.monotonic()
            done = subprocess.run(command(straight, tmp_path / "b.yaml"), cwd=ROOT, check=False)
            assert done.returncode == 0
            time.sleep(max(0.0, began + SILENT_SECONDS - time.monotonic()))
            server.signal(signal.SIGKILL)
            time.sleep(max(0.0, began + OUTAGE_SECONDS - time.monotonic()))
            assert run.poll() is None, log.read_text()
            server.start()
            manifest = newest(config)
            assert manifest is not None
            assert manifest.step <= STEPS - 40  # both snapshots wait, so training does
            assert run.wait(timeout=120) == 0, log.read_text()
        finally:
            run.kill()
    assert f"finished: step {STEPS} of {STEPS}" in log.read_text()
    # Each checkpoint that was due is there, whole and by this one attempt; none is half there.
    found = checkpoints_of(config).list()
    assert [(one.step, one.attempt, one.status) for one in found] == [
        (step, 1, "committed") for step in range(STEPS, 0, -10)
    ]
    expected, tensors = saved(straight), saved(config)
    assert expected.keys() == tensors.keys()
    assert [name for name in expected if not torch.equal(expected[name], tensors[name])] == []
    lines = open_store(config.run.storage).child(config.run.name).get("metrics.jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(5, STEPS + 1, 5))
    assert rows[-1]["checkpoint/failures"] == 0
    assert rows[-1]["checkpoint/stall_seconds"] > OUTAGE_SECONDS - 10
    straight_lines = (tmp_path / "straight/smoke/metrics.jsonl").read_text().splitlines()
    measured = ("time", "checkpoint/")
    for row, other in zip(rows, map(json.loads, straight_lines), strict=True):
        kept = {name: value for name, value in row.items() if not name.startswith(measured)}
        assert kept == {name: value for name, value in other.items() if not name.startswith(measured)}
