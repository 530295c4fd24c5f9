"""One job at a time trains a run: processes that hold it, die, race, freeze and come too late."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import ROOT, exchange

from jebm.errors import ConfigError
from jebm.store.storage import LocalStore, ObjectInfo, open_store
from jebm.train.lease import Lease

BEAT_SECONDS = 0.4
# Hold each run whose URI is said, until the next line comes.
HOLDER = """
import sys
from jebm.cli import log_lines
from jebm.errors import JebmError
from jebm.store.storage import open_store
from jebm.train.lease import Lease
log_lines()
print("ready")
for uri in iter(sys.stdin.readline, ""):
    try:
        with Lease(open_store(uri.strip()), beat_seconds=float(sys.argv[1])):
            print("holds")
            sys.stdin.readline()
        print("ended")
    except JebmError as error:
        print("refused:", error)
"""


class Holder:
    """A process that holds what it is told to hold."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", HOLDER, str(BEAT_SECONDS)],
            cwd=ROOT / "platform",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.hear("ready")

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self, *beginnings: str) -> str:
        """Return the next line that begins so; lines of its log may come before."""
        assert self.process.stdout is not None
        return next(line for line in self.process.stdout if line.startswith(beginnings))

    def hold(self, uri: str) -> None:
        self.tell(uri)
        assert self.hear("holds", "refused") == "holds\n"

    def end(self) -> None:
        self.tell("")
        assert self.hear("ended")


@pytest.fixture(scope="module")
def start(s3: object) -> Iterator[Callable[[], Holder]]:
    """Start a process; all of them end with this module."""
    started: list[Holder] = []

    def another() -> Holder:
        holder = Holder()
        limit = threading.Timer(300, holder.process.kill)  # who listens to it has no time limit of his own
        limit.daemon = True
        limit.start()
        started.append(holder)
        return holder

    yield another
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture(scope="module")
def two(start: Callable[[], Holder]) -> tuple[Holder, Holder]:
    return start(), start()


@pytest.fixture(params=["s3", "folder"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run that nobody has trained yet."""
    return str(request.getfixturevalue("s3_uri") if request.param == "s3" else tmp_path / "run")


def lease(uri: str, beat_seconds: float = BEAT_SECONDS) -> Lease:
    return Lease(open_store(uri), beat_seconds=beat_seconds)


def refusal(uri: str, beat_seconds: float) -> str:
    with pytest.raises(ConfigError) as refused, lease(uri, beat_seconds):
        pytest.fail("two hold one run")
    return str(refused.value)


def left(uri: str) -> tuple[str, bool]:
    """Return the key of the one object that a lease has left, and whether it says that its holder ended."""
    store = open_store(uri)
    (info,) = store.list()
    return info.key, json.loads(store.get(info.key))["released"]


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(BEAT_SECONDS / 4)


def test_who_lives_keeps_the_run_and_who_ends_frees_it(uri, two, caplog) -> None:  # type: ignore[no-untyped-def]
    first, other = two
    first.hold(uri)
    # Refused at the first sign of life: nobody waits for three beats of 60 s.
    line = refusal(uri, beat_seconds=10 * BEAT_SECONDS)
    assert line.startswith(f"run.name: {open_store(uri).uri} is in training by process {first.pid} on host ")
    assert f"stop it there (kill {first.pid}), or choose another run.name" in line
    other.hold(f"{uri}-2")  # another run is another matter
    other.end()
    first.end()
    caplog.clear()
    with caplog.at_level("INFO", "jebm.train"), lease(uri, beat_seconds=10):  # without a beat's wait
        assert left(uri) == ("lease/00000002.json", False)
    assert caplog.messages == []
    assert left(uri) == ("lease/00000002.json", True)


def test_the_dead_are_followed(uri, start, caplog) -> None:  # type: ignore[no-untyped-def]
    killed = start()
    killed.hold(uri)
    wait_for(lambda: json.loads(open_store(uri).get("lease/00000001.json"))["beat"])
    killed.process.kill()
    killed.process.wait()
    with caplog.at_level("INFO", "jebm.train"), lease(uri):
        assert left(uri) == ("lease/00000002.json", False)
    begins, follows = caplog.messages
    assert f"held by process {killed.pid} on host" in begins
    assert follows.endswith("has shown no life: this process goes on with the run")
    # What nobody can read holds nobody up for longer.
    open_store(uri).put("lease/00000008.json", b"\xff[")
    with lease(uri):
        assert left(uri) == ("lease/00000009.json", False)


def test_of_two_at_once_one_goes_on(uri, two) -> None:  # type: ignore[no-untyped-def]
    dead = json.dumps(
        {"token": "", "host": "x", "pid": 1, "since": "", "stop": "", "beat": 0, "released": False}
    )
    for turn in range(4):
        run = f"{uri}/{turn}"
        if turn % 2:
            open_store(run).put("lease/00000001.json", dead.encode())
        for one in two:
            one.tell(run)
        heard = [one.hear("holds", "refused") for one in two]
        assert sorted(line.split()[0].strip(":") for line in heard) == ["holds", "refused"]
        two[heard.index("holds\n")].end()
        assert left(run) == (f"lease/0000000{1 + turn % 2}.json", True)


def test_who_was_frozen_is_told_that_the_run_is_another_ones(tmp_path: Path, two, caplog) -> None:  # type: ignore[no-untyped-def]
    uri, frozen = str(tmp_path / "run"), two[0]
    frozen.hold(uri)
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        with lease(uri):
            os.kill(frozen.pid, signal.SIGCONT)
            assert frozen.hear(f"process {os.getpid()} on host").endswith(
                "has taken over this run: stop one of the two\n"
            )
            frozen.end()
            assert left(uri) == ("lease/00000002.json", False)
    finally:
        os.kill(frozen.pid, signal.SIGCONT)


def test_a_storage_that_was_away_proves_nobody_dead(s3, s3_uri: str, two, caplog) -> None:  # type: ignore[no-untyped-def]
    server = int((s3.folder / "server.pid").read_text())
    holder, refused = two[0], list[str]()
    holder.hold(s3_uri)
    watch = threading.Thread(target=lambda: refused.append(refusal(s3_uri, BEAT_SECONDS)))
    os.kill(holder.pid, signal.SIGSTOP)  # so that its next beat comes after the watcher's next look
    with caplog.at_level("INFO", "jebm.train"):
        watch.start()
        wait_for(lambda: "watching it for" in caplog.text)
    os.kill(server, signal.SIGSTOP)
    time.sleep(4 * BEAT_SECONDS)
    os.kill(server, signal.SIGCONT)
    time.sleep(BEAT_SECONDS / 4)
    os.kill(holder.pid, signal.SIGCONT)
    watch.join()
    assert f"process {holder.pid} on host" in refused[0]
    holder.end()


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
def test_a_beat_that_fails_is_told_once_and_made_up_for(tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    run, away = tmp_path / "run", tmp_path / "away"

    def beats() -> int:
        return int(json.loads((run / "lease/00000001.json").read_text())["beat"])

    with lease(str(run), beat_seconds=0.05):
        away.write_text("no folder")
        exchange(run, away)
        wait_for(lambda: "the run's lease cannot be renewed" in caplog.text)
        time.sleep(0.5)
        exchange(run, away)
        before = beats()
        wait_for(lambda: beats() > before)
    assert caplog.text.count("the run's lease cannot be renewed") == 1
    assert left(str(run)) == ("lease/00000001.json", True)


class Asleep(LocalStore):
    """A folder that a job writes to long after it has looked; what others did meanwhile is `meanwhile`."""

    meanwhile: Callable[[], object] | None = None

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        if (meanwhile := self.meanwhile) is not None:
            self.meanwhile = None
            meanwhile()
        return super().put(key, data, if_absent=if_absent)


def test_who_slept_while_others_came_and_went_is_refused(tmp_path: Path) -> None:
    store = Asleep(tmp_path)
    with ExitStack() as stack:

        def others() -> None:
            with lease(str(tmp_path)):
                pass
            stack.enter_context(lease(str(tmp_path)))  # the number 1 is free again

        store.meanwhile = others
        with pytest.raises(ConfigError, match="in training by process"), Lease(store, beat_seconds=60):
            pytest.fail("two hold one run")
        assert left(str(tmp_path)) == ("lease/00000002.json", False)


class Unconditional(LocalStore):
    """A folder that, like some S3 servers, heeds no condition."""

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> ObjectInfo:
        return super().put(key, data)


def test_without_conditional_writes_two_see_each_other(tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    ended: list[str] = []
    together, over = threading.Barrier(2), threading.Barrier(2)

    def hold() -> None:
        together.wait()
        try:
            with Lease(Unconditional(tmp_path), beat_seconds=BEAT_SECONDS):
                ended.append("holds")
                over.wait()
        except ConfigError:
            ended.append("refused")
            over.wait()

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["holds", "refused"]
    assert "has no conditional writes" in caplog.text
