"""Trackers: fed from the journal, they get every report once, whatever happens to them or to the run."""

import json
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers import tiny_config

from jebm.commands import run_command
from jebm.config import Config
from jebm.errors import ConfigError
from jebm.store.storage import Store, open_store
from jebm.train import tracking
from jebm.train.loop import Result, fit
from jebm.train.plan import make_plan
from jebm.train.runtime import process_runtime
from jebm.train.trackers import About, Ending, Reference, Row
from jebm.train.tracking import Feed

ABOUT = About("mine", "memory://x/runs/mine", {"energy.width": 50})


class Memory:
    """A tracker in this process's memory, which may be away, and which can tell how far it is."""

    name = "memory"

    def __init__(self) -> None:
        self.here = threading.Event()
        self.runs: dict[str, list[Row]] = {}
        self.files: dict[str, bytes] = {}
        self.references: list[Reference] = []
        self.endings: list[Ending] = []
        self.silent = False  # whether it never answers
        self._token = ""

    def _answer(self) -> None:
        while self.silent:
            time.sleep(0.01)
        if not self.here.is_set():
            raise ConnectionError("no route to http://me:secret@tracker")

    def open(self, token: str, about: About) -> int | None:
        self._answer()
        self._token = token
        rows = self.runs.setdefault(token, [])
        return rows[-1].step if rows else -1

    def rows(self, rows: Sequence[Row]) -> None:
        self._answer()
        self.runs[self._token] += rows

    def file(self, key: str, content: bytes, step: int) -> None:
        self._answer()
        self.files[key] = content

    def checkpoint(self, reference: Reference) -> None:
        self._answer()
        self.references.append(reference)

    def close(self, ending: Ending) -> None:
        self._answer()
        self.endings.append(ending)

    @property
    def steps(self) -> list[int]:
        (rows,) = self.runs.values()
        return [row.step for row in rows]


@pytest.fixture
def run() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}/runs/mine")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(tracking, "_LAST_PATIENCE_SECONDS", 2.0)


def journal(run: Store, *steps: int) -> None:
    run.put("metrics.jsonl", "".join(json.dumps({"step": s, "loss": 2.0 * s}) + "\n" for s in steps).encode())


def until(done: Callable[[], bool]) -> None:
    for _ in range(1000):
        if done():
            return
        time.sleep(0.01)
    raise TimeoutError


def test_every_report_arrives_once_also_after_an_outage_and_its_secrets_stay(
    run: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tracker = Memory()
    feed = Feed(tracker, run, ABOUT, 0)
    for step in range(1, 6):
        feed.row(step, {"loss": 1.0, "odd": float("nan")})
    until(lambda: "is away" in caplog.text)
    tracker.here.set()
    run.put("pictures/step-00000003.png", b"png")
    run.put("run.json", b"{}")
    run.put("evaluations/step-3-quick/evaluation.html", b"page")
    run.put("evaluations/step-3-quick/pictures/a.png", b"part of it")
    feed.files_changed()
    feed.row(6, {"loss": 1.0})
    feed.close("finished")
    assert feed.complete
    assert tracker.steps == [1, 2, 3, 4, 5, 6]
    assert [row.metrics for row in tracker.runs.popitem()[1]] == [{"loss": 1.0}] * 6
    assert tracker.files == {
        "pictures/step-00000003.png": b"png",
        "run.json": b"{}",
        "evaluations/step-3-quick/evaluation.html": b"page",
    }
    assert tracker.endings == ["finished"]
    assert caplog.text.count("is away") == caplog.text.count("has caught up") == 1
    assert "secret" not in caplog.text


def test_a_silent_tracker_delays_no_report_and_bounds_memory(run: Store) -> None:
    tracker = Memory()
    tracker.silent = True
    feed = Feed(tracker, run, ABOUT, 0)
    began = time.perf_counter()
    for step in range(1, 5001):
        feed.row(step, {"loss": 1.0})
    feed.files_changed()
    assert (time.perf_counter() - began) / 5000 < 0.005  # seconds; a step of training takes more
    assert len(feed._waiting) == 2000
    journal(run, *range(1, 5001))
    tracker.here.set()
    tracker.silent = False
    until(lambda: len(tracker.runs) == 1 and len(tracker.steps) == 5000)
    feed.close("finished")
    assert tracker.steps == list(range(1, 5001))  # the oldest 3,000 from the journal


def test_a_resumed_run_continues_the_same_tracker_run_without_gap_or_repetition(run: Store) -> None:
    tracker = Memory()
    tracker.here.set()
    first = Feed(tracker, run, ABOUT, 0)
    for step in (10, 20, 30, 37):
        first.row(step, {"loss": 1.0})
    until(lambda: len(tracker.runs) == 1 and tracker.steps == [10, 20, 30, 37])
    tracker.here.clear()
    first.close("failed")  # the job dies: what it had sent is not recorded
    assert not first.complete
    # It resumes from step 30: 37 is made again, and 40 is new.
    tracker.here.set()
    journal(run, 10, 20, 30)
    second = Feed(tracker, run, ABOUT, 30)
    for step in (37, 40):
        second.row(step, {"loss": 1.0})
    second.close("stopped")
    assert tracker.steps == [10, 20, 30, 37, 40]
    # The tracker has lost its last reports, as when its disk was restored.
    del tracker.runs[next(iter(tracker.runs))][2:]
    journal(run, 10, 20, 30, 37, 40)
    third = Feed(tracker, run, ABOUT, 40)
    third.row(50, {"loss": 1.0})
    third.close("finished")
    assert tracker.steps == [10, 20, 30, 37, 40, 50]
    assert len(tracker.runs) == 1


@pytest.mark.parametrize("record", [b"{", b'{"token": "../x", "step": 1}', b"[" * 10_000, b'{"token": 7}'])
def test_a_damaged_record_begins_a_new_tracker_run(run: Store, record: bytes) -> None:
    run.put("trackers/memory.json", record)
    tracker = Memory()
    tracker.here.set()
    Feed(tracker, run, ABOUT, 0).close("finished")
    assert len(tracker.runs) == 1


def train(config: Config) -> Result:
    with process_runtime(config) as runtime:
        return fit(config, runtime, provenance={})


def test_wandb_offline_has_the_whole_run_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(tracking, "_LAST_PATIENCE_SECONDS", 60.0)  # to import wandb on a busy machine
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "PROJECT": "test"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    config = tiny_config(tmp_path / "runs", run__track=["wandb"], checkpoint__every_steps=10)
    train(config)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    record = json.loads((tmp_path / "runs/smoke/trackers/wandb.json").read_text())
    assert record["step"] == 20
    assert record["token"] in file.name
    assert record["checkpoint"] == "step-00000020-a0001"
    for word in (b"distortion", b"energy.width", b"step-00000020-a0001/MANIFEST.json", b"manifest_sha256"):
        assert word in content
    assert not (tmp_path / "runs/smoke/tensorboard").exists()


def test_what_a_tracker_needs_is_asked_for_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(
        ConfigError, match=r"run\.track: mlflow needs the server's address in MLFLOW_TRACKING_URI"
    ):
        make_plan(tiny_config(tmp_path, run__track=["mlflow"]))


def test_the_command_says_in_a_line_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "mine"))
    store.put(
        "run.json", json.dumps({"config": {"run": {"track": ["tensorboard"]}}, "attempts": []}).encode()
    )

    def track(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["jebm", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_command("track")
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert track(str(tmp_path / "mine")).endswith("names no tracker; give --to '[mlflow]'\n")
    assert track(str(tmp_path / "other")).endswith("no run here; jebm runs lists the runs of a storage\n")
    assert "must be one of wandb, mlflow" in track(str(tmp_path / "mine"), "--to", "[tensorboard]")
    store.put("run.json", b'{"config": 7}')
    assert "config is a int" in track(str(tmp_path / "mine"))
