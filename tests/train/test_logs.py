"""What a process logs is in the run's storage afterwards: bounded, escaped, without secrets, always."""

import logging
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from helpers import ROOT

from jebm.store.results import fetch_results
from jebm.store.storage import Store, open_store
from jebm.train import logs
from jebm.train.logs import LOGS, KeptLog

LOG = logging.getLogger("jebm.train")
KEY = "hunter2hunter2"
DIES = """
import logging, os, sys, time
from jebm.store.storage import open_store
from jebm.train.logs import KeptLog
logging.getLogger("jebm").setLevel(logging.INFO)
with KeptLog(open_store(sys.argv[1]), "rank-00001"):
    logging.getLogger("jebm.train").info("began")
    logging.getLogger("jebm.train").error("stands here")
    time.sleep(600)
"""


@pytest.fixture
def run() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}/runs/mine")


def texts(run: Store) -> dict[str, str]:
    """Return what is kept, by who has logged."""
    found = {}
    for info in run.list(LOGS):
        named = re.fullmatch(r"logs/\d{8}T\d{6}Z-(.+)\.log", info.key)
        assert named is not None, info.key
        found[named[1]] = run.get(info.key).decode()
    return found


def test_lines_and_the_last_error_are_kept_escaped_and_without_secrets(
    run: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/etc/ray/token")
    caplog.set_level(logging.INFO, "jebm")

    def train() -> None:
        with KeptLog(run, "driver"):
            LOG.info("step 1\x1b[2J of %s", KEY)
            LOG.warning("cannot reach http://me:%s@host/ nor /etc/ray/token", "short")
        raise ZeroDivisionError(KEY)

    with pytest.raises(ZeroDivisionError), KeptLog(run, "rank-00000"):
        train()
    kept = texts(run)
    lines = kept["driver"].splitlines()
    assert len(lines) == 2
    assert re.match(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}Z INFO jebm\.train: step 1\\x1b\[2J of \[secret]$", lines[0]
    )
    assert lines[1].endswith("WARNING jebm.train: cannot reach http://[secret]@host/ nor /etc/ray/token")
    assert kept["rank-00000"].splitlines()[:2] == lines
    assert kept["rank-00000"].endswith("ZeroDivisionError: [secret]\n")
    assert KEY not in "".join(kept.values())


def test_a_file_is_bounded_and_so_are_all_together(
    run: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jebm")
    monkeypatch.setattr(logs, "_FILE_BYTES", 10_000)
    monkeypatch.setattr(logs, "_ALL_BYTES", 25_000)
    for year in (2020, 2021, 2022):
        run.put(f"logs/{year}0101T000000Z-driver.log", b"x" * 9_000)
    with KeptLog(run, "rank-00000"):
        for step in range(1000):
            LOG.info("step %d", step)
    infos = {info.key: info.size for info in run.list(LOGS)}
    assert sum(infos.values()) <= 25_000 + 100  # a line about what is missing
    newest = max(infos)
    assert sorted(infos)[0] == "logs/20220101T000000Z-driver.log"
    lines = run.get(newest).decode().splitlines()
    assert re.fullmatch(r"\(\d{3} earlier lines are not kept\)", lines[0])
    assert lines[-1].endswith("step 999")
    assert infos[newest] <= 10_100


def test_a_jobs_output_is_kept_in_place_of_the_drivers_log(
    run: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def train() -> None:
        LOG.warning("only here")
        raise OSError("gone")

    output = b"(rank 0) step 1\n\x1b[2Jend\xff\n"
    with pytest.raises(OSError, match="gone"), KeptLog(run, "driver", lambda: output):
        train()
    lines = texts(run)["driver"].splitlines()
    assert lines[:2] == ["(rank 0) step 1", "\\x1b[2Jend\ufffd"]
    assert lines[-1] == "OSError: gone"


def test_a_process_that_is_killed_has_left_its_errors(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", DIES, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    try:
        while not texts(store):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
    _, said = process.communicate(timeout=300)
    (text,) = texts(store).values()
    assert [line.split(": ", 1)[1] for line in text.splitlines()] == ["began", "stands here"]
    assert said == "stands here\n"  # as without any handler


def test_a_storage_that_takes_nothing_neither_slows_nor_ends_a_run(tmp_path: Path) -> None:
    (tmp_path / "logs").write_bytes(b"no folder")
    with KeptLog(open_store(str(tmp_path)), "rank-00000"):
        LOG.error("lost")
    assert (tmp_path / "logs").read_bytes() == b"no folder"


def test_fetch_brings_the_logs(run: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run.put("run.json", b"{}")
    with KeptLog(run, "rank-00000"):
        LOG.warning("said")
    fetch_results(run, tmp_path, lambda size: lambda done: None)
    (path,) = tmp_path.glob("logs/*-rank-00000.log")
    assert path.read_text().endswith(" WARNING jebm.train: said\n")
