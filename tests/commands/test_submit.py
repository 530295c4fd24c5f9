"""`jebm submit`: which jobs are sent again, and bad input."""

import http.server
import re
import socket
import threading
from collections.abc import Iterator

import pytest
from ray.job_submission import JobDetails, JobErrorType, JobStatus, JobType
from refusal import refusal

from jebm.on_ray.submission import ending_of

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    line = refused(capsys, monkeypatch, *TRAIN)
    assert f"RAY_ADDRESS: Failed to connect to Ray at address: {nobody}" in line
    assert "start the cluster there, or open the way to it" in line
