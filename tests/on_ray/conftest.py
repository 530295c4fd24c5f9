"""A Ray cluster of its own with token authentication, in an environment where jebm is not installed."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class RayCluster:
    """One node started with `ray start --head`; `environment` is what a client of it needs."""

    python: Path
    environment: dict[str, str]

    def ray(self, *arguments: str) -> list[str]:
        """Return the command line of Ray's own tool."""
        return [str(self.python), "-m", "ray.scripts.scripts", *arguments]

    def submit(self, *entrypoint: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Submit a job from the repository's root, and follow it."""
        command = self.ray("job", "submit", "--working-dir", str(ROOT), *options, "--", *entrypoint)
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *entrypoint: str) -> tuple[int, str]:
        """Submit a job and wait for its end; return the exit code and what was printed."""
        with self.submit(*entrypoint) as job:
            output, _ = job.communicate(timeout=240)
            return job.returncode, output


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3: object) -> Iterator[RayCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    # The packages of this environment by path alone: the hook of an editable installation is not run.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    library = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    (library / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    port, dashboard = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
    environment |= {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # `python` of a job's command line
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
        "JEBM_CACHE": str(folder / "cache"),
    }
    start = ["start", "--head", "--block", "--num-cpus", "3", "--port", str(port)]
    start += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    client = environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    ray = RayCluster(python, client)
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(
            ray.ray(*start), env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    try:
        for _ in range(60):
            listed = subprocess.run(ray.ray("job", "list"), env=client, capture_output=True, check=False)
            if listed.returncode == 0:
                break
            assert head.poll() is None, (folder / "log").read_text()
            time.sleep(1)
        else:
            pytest.fail((folder / "log").read_text())
        yield ray
    finally:
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
