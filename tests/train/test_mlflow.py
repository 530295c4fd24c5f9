"""A real MLflow server, killed and restarted while a run trains; scripts/test-long installs it."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from ports import free_port

ROOT = Path(__file__).parents[2]
SERVER = os.environ.get("JEBM_MLFLOW", "")
PATIENCE = 240.0


@contextmanager
def server(folder: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """An MLflow server on loopback, with its database and artifacts in a folder."""
    values = {
        "host": "127.0.0.1",
        "port": port,
        "workers": 1,
        "backend-store-uri": f"sqlite:///{folder}/db.sqlite",
        "artifacts-destination": folder / "artifacts",
    }
    options = [f"--{name}={value}" for name, value in values.items()]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (
        (folder / "server.log").open("ab") as log,
        subprocess.Popen(
            [SERVER, "server", *options], stdout=log, stderr=log, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            for _ in range(int(PATIENCE)):
                try:
                    with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except (URLError, OSError):
                    time.sleep(1)
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def command(storage: Path, epochs: float) -> list[str]:
    values = ["--config=smoke", "--cluster.engine=process", "--cluster.workers=1", f"--run.storage={storage}"]
    values += [f"--train.epochs={epochs}", "--train.report_every_steps=2", "--train.pictures_every_steps=500"]
    values += ["--checkpoint.every_steps=100", "--run.track=[mlflow]"]
    return [sys.executable, "-m", "jebm", "train", *values]


def lines_until(process: "subprocess.Popen[str]", step: int) -> None:
    """Read a run's log until it reports a step."""
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"step (\d+)/", line)
        if found and int(found[1]) >= step:
            return
    raise AssertionError("the run has ended")


@pytest.mark.long
@pytest.mark.skipif(not SERVER, reason="JEBM_MLFLOW does not name an mlflow command; scripts/test-long does")
def test_a_server_killed_during_a_run_has_every_report_afterwards_and_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    storage = tmp_path / "runs"

    def train(epochs: float) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command(storage, epochs), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    # The server dies by SIGKILL in mid-run, and comes back before the end.
    epochs = 20.0
    with server(tmp_path, port):
        run = train(epochs)
        client = MlflowClient()
        deadline = time.monotonic() + PATIENCE
        while not (found := client.get_experiment_by_name("jebm")) or not client.search_runs(
            [found.experiment_id]
        ):
            assert time.monotonic() < deadline
            time.sleep(1)
        lines_until(run, 30)
    lines_until(run, 150)
    run.send_signal(signal.SIGSTOP)  # a busy machine would end the run before the server has started
    with server(tmp_path, port):
        run.send_signal(signal.SIGCONT)
        output, _ = run.communicate(timeout=4 * PATIENCE)
        assert run.returncode == 0, output
        # What a server that answers slowly has not taken by the end is sent afterwards.
        track = [sys.executable, "-m", "jebm", "track", str(storage / "smoke")]
        subprocess.run(track, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE)
        # A second start trains further: the same tracker run.
        run = train(epochs + 1)
        output, _ = run.communicate(timeout=4 * PATIENCE)
        assert run.returncode == 0, output
        rows = [json.loads(line) for line in (storage / "smoke/metrics.jsonl").read_text().splitlines()]
        (tracked,) = client.search_runs([client.get_experiment_by_name("jebm").experiment_id])
        for metric in ("distortion", "f_prior"):
            points = client.get_metric_history(tracked.info.run_id, metric)
            assert [(p.step, p.value) for p in points] == [(row["step"], row[metric]) for row in rows]
        assert (tracked.info.run_name, tracked.info.status) == ("smoke", "FINISHED")
        pictures = [file.path for file in client.list_artifacts(tracked.info.run_id, "pictures")]
        assert pictures == [
            f"pictures/{path.name}" for path in sorted((storage / "smoke/pictures").iterdir())
        ]
        assert tracked.data.tags["jebm.checkpoint"].endswith(f"/step-{rows[-1]['step']:08d}-a0002")
    # For whoever measures on an idle machine; that a report costs no time is tested in test_tracking.py.
    seconds = {row["step"]: row["time/seconds_per_step"] for row in rows}
    present = statistics.median(value for step, value in seconds.items() if step < 30 or step > 200)
    away = statistics.median(value for step, value in seconds.items() if 40 < step < 150)
    print(f"seconds per step: {present:.4f} with the server, {away:.4f} without it")
