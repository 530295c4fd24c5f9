"""The page of a sweep that runs, asked for as a browser does."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_sweeps import center, ended, make_sweep, running, sweep_of, trial

from html_page import HtmlPage
from jebm.errors import CheckpointError
from jebm.store.storage import open_store
from jebm.sweep import watch as module
from jebm.sweep.results import Sweep
from jebm.sweep.watch import Watch, progress, seconds_left


def sweep(finished: int = 0, *, running: tuple[float, ...] = (), trials: int = 10) -> Sweep:
    """Trials that took 100 s each, running ones at these seconds, and a search for this many."""
    made = [ended(i, center(), 1.0, seconds=100.0) for i in range(finished)]
    made += [ended(99, center(), status="running", seconds=seconds) for seconds in running]
    found = sweep_of(made)
    return Sweep(**vars(found) | {"search": {"trials": trials}})


def test_the_time_left_is_that_of_what_has_ended_on_as_many_places_as_now() -> None:
    assert seconds_left(sweep(2, running=(40.0, 90.0))) == (60 + 10 + 6 * 100) / 2
    assert seconds_left(sweep(8, running=(0.0, 90.0))) == 100.0  # the longest, not the mean
    assert seconds_left(sweep(9, running=(130.0,))) == 0.0
    assert seconds_left(sweep(10)) == 0.0
    assert seconds_left(sweep(0, running=(40.0,))) is None
    assert seconds_left(sweep(5)) is None


def test_progress_counts_each_trial_once() -> None:
    found = sweep(3, running=(50.0,))
    others = [
        ended(50, center(), status="pruned", seconds=100.0),
        ended(51, center(), 1.0, seconds=0.0, same_as="t0000", attempts=0),  # no measure of the time
        ended(52, center(), status="failed"),
        ended(53, center(), status="running", attempts=0),  # drawn, not begun
    ]
    found = Sweep(**vars(found) | {"trials": (*found.trials, *others)})
    assert progress(found, running=True) == (
        "Progress: 5 of 10 trials done (4 finished, 1 pruned), 1 running, 4 waiting, 1 failed. "
        "About 7.5 min left."
    )
    assert progress(found, running=False).endswith(
        "No job runs it now; the command that began it resumes it."
    )
    assert progress(sweep(0, running=(1.0,)), running=True).endswith("unknown until a trial has ended.")
    assert progress(sweep(10), running=False).endswith("0 running, 0 waiting. Nothing is left to run.")


class Client:
    """What a browser sends to a watch."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, path: str = "/", *, method: str = "GET", host: str = "") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trials = [trial(center(), 11.0), trial(center(), 12.0), running(center(), 20_000)]
    return Path(make_sweep(tmp_path / "sweep", trials, search={"trials": 5, "space": {}}))


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0)  # made anew at each request
    server = Watch(open_store(str(folder)), lambda: True)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield Client(server.port)
    server._server.shutdown()
    thread.join(10)


def test_the_page_has_progress_and_refreshes_itself_from_the_store(
    folder: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 1e-9)
    status, text = client()
    assert status == 200
    assert "Progress: 2 of 5 trials done (2 finished), 1 running, 2 waiting. About" in text
    assert '<meta http-equiv="refresh" content="' in text
    assert "<script" not in text
    assert HtmlPage(text).having("href") == [f"#{anchor}" for anchor in re.findall(r'href="#([^"]+)"', text)]
    # The store changes, and so does the page; while it cannot be read, the page says so.
    record = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(record | {"search": {"trials": 9, "space": {}}}))
    assert "2 of 9 trials done" in client(host=f"localhost:{client.port}")[1]
    (folder / "study.log").write_text('{"<b>\n')
    status, text = client()
    assert (status, "It cannot be read now: " in text, "<b>" in text) == (503, True, False)
    assert '<meta http-equiv="refresh"' in text


def test_nothing_else_is_served(client: Client) -> None:
    for path in ("/study.log", "/../sweep.json", "/?x=1", "/report.html"):
        assert client(path)[0] == 404
    assert client(method="POST")[0] == client(method="HEAD")[0] == 501
    for host in ("evil.example", f"evil.example:{client.port}", "127.0.0.1"):
        status, text = client(host=host)
        assert (status, "Progress" in text) == (403, False)


def test_no_sweep_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no sweep here"):
        Watch(open_store(str(tmp_path)), lambda: True)


def test_ctrl_c_ends_the_command_at_once_with_0(folder: Path) -> None:
    command = [sys.executable, "-m", "jebm", "tune", "watch", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ shows file://\S+; Ctrl-C ends it\n", line)
        assert found is not None, line
        assert Client(int(found[1]))("/study.log")[0] == 404
        # In the middle of an answer to somebody who does not ask.
        silent = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        silent.connect()
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=90)
        silent.close()
    assert (server.returncode, output, errors) == (0, "", "")
