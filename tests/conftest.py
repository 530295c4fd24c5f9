"""Fixtures that several rooms share."""

import os
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Ray gives a node's agents half a minute to start, and more than one Ray may be starting on these cores.
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")

# By the time that their files take, from little to much.
SLOW = ("/sweep/", "/evaluate/", "/store/", "/train/", "/tests/test_", "/commands/", "/cluster/", "/on_ray/")
SCRIPT = Path(__file__).parent.parent / "scripts" / "s3"


@dataclass(frozen=True)
class S3Server:
    """The real server of `scripts/s3`, in a folder of this test session."""

    folder: Path

    def run(self, action: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), action, "--dir", str(self.folder), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)

    def uri(self, prefix: str = "") -> str:
        return f"s3://jebm/{prefix}".rstrip("/")

    def environment(self, identity: str = "trainer") -> dict[str, str]:
        """What a client's environment needs: endpoint, region and the keys of admin, trainer or reader."""
        done = self.run("env", "--identity", identity)
        assert done.returncode == 0, done.stderr
        words = shlex.split(next(line for line in done.stdout.splitlines() if line.startswith("export ")))
        return dict(word.split("=", 1) for word in words[1:])


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server; this process's environment points at it, with the trainer's keys."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    started = server.run("start")
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        # Whatever profile the person at this machine has must not decide what the tests see.
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name, value in server.environment().items():
            patch.setenv(name, value)
        try:
            yield server
        finally:
            # Not `stop`, which takes the server 15 s: this data is for nobody.
            os.kill(int((server.folder / "server.pid").read_text()), signal.SIGKILL)


@pytest.fixture
def s3_uri(s3: S3Server) -> str:
    """A prefix of the bucket that no other test uses."""
    return s3.uri(uuid.uuid4().hex)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded images and classifiers, for `JEBM_CACHE`: each is made once for all files and workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first, those with servers later, those with Ray clusters last; the reverse among workers."""
    paths = {item.path for item in items}
    rank = {path: next((i for i, room in enumerate(SLOW, 1) if room in str(path)), 0) for path in paths}
    among_workers = hasattr(config, "workerinput")  # the one that ends last then has little left
    items.sort(key=lambda item: rank[item.path], reverse=among_workers)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Among several workers, a file is one worker's: its fixtures are made once.

    All files with Ray clusters are one worker's: two clusters would fight for the CPUs. (Lines of the docs
    start small ones.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            clusters = "/on_ray/" in nodeid or "/cluster/" in nodeid
            return "clusters" if clusters else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # not by the number of tests, but as sorted above
    return Scheduler(config, log)
