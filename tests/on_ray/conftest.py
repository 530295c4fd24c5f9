"""A Ray cluster of its own with token authentication, in an environment where jebm is not installed."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ports import free_port

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class RayCluster:
    """One node started with `ray start --head`; `environment` is what a client of it needs."""

    python: Path
    environment: dict[str, str]
    address: str
    folder: Path
    scratch: Path

    def ray(self, *arguments: str) -> list[str]:
        """Return the command line of Ray's own tool."""
        return [str(self.python), "-m", "ray.scripts.scripts", *arguments]

    def stop(self, process: "subprocess.Popen[bytes]") -> None:
        """End what `ray start --block` has started."""
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def start(self, *options: str) -> "subprocess.Popen[bytes]":
        """Start a node of the cluster; its environment has no address of a job server."""
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        # Ray's own choice is the same for every cluster on a machine, and for two nodes on one.
        ports = ["--dashboard-agent-listen-port", str(free_port())]
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                self.ray("start", "--block", "--node-ip-address", "127.0.0.1", *ports, *options),
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )

    def node_ids(self) -> set[str]:
        """Return the ids of the nodes that are alive."""
        for _ in range(30):
            listed = subprocess.run(
                self.ray("list", "nodes", "--format", "json"),
                env=self.environment,
                capture_output=True,
                check=False,
            )
            if b"[" in listed.stdout:  # a cluster that has just begun may not know of its nodes yet
                break
            time.sleep(1)
        nodes = json.loads(listed.stdout[listed.stdout.index(b"[") :])
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE"}

    @contextmanager
    def second_node(self, cpus: int) -> Iterator["Node"]:
        """Add a node for a while."""
        before = self.node_ids()
        process = self.start("--address", self.address, "--num-cpus", str(cpus))
        try:
            for _ in range(60):
                if new := self.node_ids() - before:
                    break
                time.sleep(1)
            (name,) = new
            yield Node(self, process, name)
        finally:
            self.stop(process)

    def submit(self, *entrypoint: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Submit a job from the repository's root, and follow it."""
        command = self.ray("job", "submit", "--working-dir", str(ROOT), *options, "--", *entrypoint)
        job = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # Who reads its lines has no time limit of his own.
        limit = threading.Timer(300, job.kill)
        limit.daemon = True
        limit.start()
        return job

    def driver_log(self, submission_id: str) -> str:
        """Return what the driver of a job has printed so far, read from Ray's own folder."""
        return (self.scratch / "session_latest/logs" / f"job-driver-{submission_id}.log").read_text()

    def run(self, *entrypoint: str) -> tuple[int, str]:
        """Submit a job and wait for its end; return the exit code and what was printed."""
        with self.submit(*entrypoint) as job:
            output, _ = job.communicate(timeout=240)
            return job.returncode, output


@dataclass(frozen=True)
class Node:
    """A node that may be taken away."""

    cluster: RayCluster
    process: "subprocess.Popen[bytes]"
    name: str

    def drain(self, seconds: int) -> None:
        """Announce that it will be gone in so many seconds."""
        notice = ["--node-id", self.name, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        notice += ["--reason-message", "test", "--deadline-remaining-seconds", str(seconds)]
        command = self.cluster.ray("drain-node", "--address", self.cluster.address, *notice)
        subprocess.run(command, env=self.cluster.environment, check=True, timeout=60)

    def kill(self) -> None:
        """Take it away: all of its processes at once."""
        os.killpg(self.process.pid, signal.SIGKILL)


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
    # Not Ray's own: a job joins the cluster that was last started with its folder. Short, for its sockets.
    scratch = tempfile.mkdtemp(prefix="ray-")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
    environment |= {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # `python` of a job's command line
        "PYTHONUNBUFFERED": "1",  # on a pipe, Ray's tool would hold lines back that a terminal gets
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
        "JEBM_CACHE": str(folder / "cache"),
    }
    client = environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    ray = RayCluster(python, client, f"127.0.0.1:{port}", folder, Path(scratch))
    head = ray.start(
        *("--head", "--num-cpus", "3", "--port", str(port)),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(free_port()), "--temp-dir", scratch),
    )
    try:
        # Not `ray job list`, which answers before there is an agent that could start a job.
        first = ray.ray("job", "submit", "--no-wait", "--", "true")
        for _ in range(60):
            if subprocess.run(first, env=client, capture_output=True, check=False).returncode == 0:
                break
            assert head.poll() is None, (folder / "log").read_text()
            time.sleep(1)
        else:
            pytest.fail((folder / "log").read_text())
        yield ray
    finally:
        ray.stop(head)
        shutil.rmtree(scratch, ignore_errors=True)
