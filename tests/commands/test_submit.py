"""`jebm submit`: which jobs are sent again, and bad input."""

import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobDetails, JobErrorType, JobStatus, JobType
from refusal import refusal

from jebm.on_ray.submission import ending_of, supervise

TRAIN = ("--", "python", "jobs/train.py")


@pytest.mark.parametrize(
    ("code", "last_line", "accepted", "curable"),
    [
        (0, "", False, False),
        (1, "ValueError: no", False, True),
        (1, "diverged: loss is nan at step 8", False, False),
        (2, "error: energy.widht: unknown", False, False),
        (2, "error: cluster.workers: 2 workers do not fit", True, True),  # nodes have yet to come back
        (3, "stopped: step 8 of 16", True, False),
        (130, "interrupted", True, False),
        (-15, "", True, False),
        (-9, "", False, True),
        (137, "", False, True),
    ],
)
def test_what_a_restart_may_cure(code: int, last_line: str, accepted: bool, curable: bool) -> None:
    status = JobStatus.FAILED if code else JobStatus.SUCCEEDED
    info = JobDetails(type=JobType.SUBMISSION, entrypoint="x", status=status, driver_exit_code=code)
    ending = ending_of(info, last_line, accepted=accepted)
    assert (ending.curable, ending.code) == (curable, code if code >= 0 else 1)


def test_a_job_that_ran_for_long_was_accepted() -> None:
    """A wrong value is found within minutes: what ends a longer run with code 2 is a storage that is away."""
    job = {"type": JobType.SUBMISSION, "entrypoint": "x", "status": JobStatus.FAILED, "driver_exit_code": 2}
    for minutes, curable in ((1, False), (60, True)):
        info = JobDetails(**job, start_time=10**12, end_time=10**12 + minutes * 60_000)
        assert ending_of(info, "error: s3://b: no answer", accepted=False).curable == curable


@pytest.mark.parametrize(
    ("kind", "accepted", "curable"),
    [
        (JobErrorType.RUNTIME_ENV_SETUP_FAILURE, False, False),  # packages that cannot be installed
        (JobErrorType.RUNTIME_ENV_SETUP_FAILURE, True, True),  # it was built before
        (JobErrorType.JOB_SUPERVISOR_ACTOR_DIED, False, True),  # with the head's memory
    ],
)
def test_a_job_without_a_driver(kind: JobErrorType, accepted: bool, curable: bool) -> None:
    info = JobDetails(
        type=JobType.SUBMISSION, entrypoint="x", status=JobStatus.FAILED, error_type=kind, message="why"
    )
    ending = ending_of(info, "", accepted=accepted)
    assert (ending.curable, ending.reason) == (curable, "died: why")


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Run the command in this process; return its one line."""
    return refusal(capsys, monkeypatch, "submit", *words)


@pytest.mark.parametrize(
    ("address", "words", "line"),
    [
        ("http://127.0.0.1:1", (), "COMMAND: missing; write it after two dashes: jebm submit -- python"),
        ("http://127.0.0.1:1", ("python", "x"), "unexpected argument python; see --help"),
        ("http://127.0.0.1:1", ("--restarts", "-1", *TRAIN), "restarts: must not be negative"),
        ("http://127.0.0.1:1", ("--runtime-env", "no.yaml", *TRAIN), "no.yaml: there is no such file"),
        ("", TRAIN, "RAY_ADDRESS: unset is no job server's address; write http://HOST:8265"),
        ("192.0.2.10:6379", TRAIN, "RAY_ADDRESS: 192.0.2.10:6379 is no job server's address; write http"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    words: tuple[str, ...],
    line: str,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert re.search(line, refused(capsys, monkeypatch, *words))


def test_a_wrong_runtime_environment_is_refused_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    file = tmp_path / "environment.yaml"
    for text in (
        "env_vars: {OMP_NUM_THREADS: 1}",
        "pip: 5",
        "working_dir: 5",
        "excludes: 5",
        "env_vars: [A]",
    ):
        file.write_text(text)
        line = refused(capsys, monkeypatch, "--runtime-env", str(file), *TRAIN)
        assert "runtime-env: " in line
        assert "RAY_ADDRESS" not in line
    file.write_text("[env_vars]")
    line = refused(capsys, monkeypatch, "--runtime-env", str(file), *TRAIN)
    assert f"{file}: holds no keys; give a YAML file with lines such as `env_vars: {{NAME: value}}`" in line


@pytest.mark.filterwarnings("ignore:ssl=None:DeprecationWarning")  # Ray's client of the log
def test_a_job_whose_answer_was_lost_is_followed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in for Ray's job server, which takes the job and hangs up."""
    received: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            job = {"type": "SUBMISSION", "entrypoint": "true", "status": "SUCCEEDED", "driver_exit_code": 0}
            self.send_response(404 if "/jobs/" in self.path and not received else 200)
            self.end_headers()
            self.wfile.write(json.dumps(job | {"ray_version": ray.__version__}).encode())

        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = supervise(f"http://127.0.0.1:{server.server_port}", "true", {"working_dir": "."}, restarts=0)
        server.shutdown()
    assert (code, len(received)) == (0, 1)
    assert "sent jebm-" in caplog.text


@pytest.fixture
def locked() -> Iterator[str]:
    """A server that lets nobody in."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_not_there_or_wants_a_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", locked)
    assert "refuses the token: set RAY_AUTH_MODE=token" in refused(capsys, monkeypatch, *TRAIN)
    nobody = "http://127.0.0.1:9"
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    line = refused(capsys, monkeypatch, *TRAIN)
    assert f"RAY_ADDRESS: Failed to connect to Ray at address: {nobody}" in line
    assert "start the cluster there, or open the way to it" in line
