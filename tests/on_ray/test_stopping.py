"""A stop is obeyed in every phase, and neither a stop nor a kill leaves anything reserved in the cluster."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store

ROOT = Path(__file__).parents[2]
SMOKE = "--config=jobs/configs/smoke.yaml"
SEARCH = """
space: {optimizer.generator.lr: [choice, [3e-3, 1e-3]]}
objective: {metric: distortion, direction: minimize}
sampler: grid
"""
# Holds CPUs, and is no job of ours.
HOLDER = """
import ray, sys, time
from ray.util.placement_group import placement_group
ray.init(log_to_driver=False)
ray.get(placement_group([{"CPU": 1}] * int(sys.argv[1])).ready())
print("ready", flush=True)
time.sleep(3600)
"""
# Waits for a group in an actor that outlives its job, as a controller does that is killed while it waits.
WAITER = """
import ray, sys, time
from ray.util.placement_group import placement_group
ray.init(log_to_driver=False)
if sys.argv[1] == "ours":
    sys.path.insert(0, "platform")
    from jebm.on_ray.reservations import mark_job
    mark_job()

@ray.remote(num_cpus=0)
class Waiter:
    def wait(self):
        self.group = placement_group([{"CPU": 1000}])

waiter = Waiter.options(name=sys.argv[2], namespace="waiters", lifetime="detached").remote()
ray.get(waiter.wait.remote())
print("job", ray.get_runtime_context().get_job_id(), flush=True)
time.sleep(3600)
"""
CLEANER = """
import ray
ray.init(namespace="waiters", log_to_driver=False)
for name in ("ours", "theirs", "alive"):
    ray.kill(ray.get_actor(name))
"""
START = 300  # seconds for a start with its imports
PATIENCE = 60  # seconds for what takes some on a quiet machine, and took two minutes and a SIGKILL
if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)


def wait_for(what: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


class Driver:
    """A process that joins the cluster, with its log."""

    def __init__(self, cluster: Any, log: Path, *command: str) -> None:
        self.log = log
        environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(cluster.python), *command], cwd=ROOT, env=environment, stdout=file, stderr=file
            )

    def says(self, pattern: str) -> re.Match[str]:
        """Wait until a line of the log matches."""

        def look() -> bool:
            assert self.process.poll() is None or re.search(pattern, self.log.read_text()), (
                self.log.read_text()
            )
            return re.search(pattern, self.log.read_text()) is not None

        wait_for(look)
        found = re.search(pattern, self.log.read_text())
        assert found is not None
        return found

    def end(self, number: signal.Signals) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        since = time.monotonic()
        try:
            code = self.process.wait(timeout=PATIENCE)
            print(f"{self.log.name}: ended {time.monotonic() - since:.1f} s after {number.name}")
            return code
        finally:
            self.process.kill()


@contextmanager
def running(driver: Driver, pattern: str) -> Iterator[re.Match[str]]:
    try:
        yield driver.says(pattern)
    finally:
        driver.process.kill()
        driver.process.wait()


def groups(cluster: Any) -> dict[str, str]:
    """Return the placement groups that reserve something, or want to: their ids, with the job's."""
    command = cluster.ray("list", "placement-groups", "--detail", "--format=json", "--limit=1000")
    listed = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=True)
    found = json.loads(listed.stdout[listed.stdout.index("[") :])
    return {
        group["placement_group_id"]: group["creator_job_id"] for group in found if group["state"] != "REMOVED"
    }


def settles(cluster: Any, expected: dict[str, str]) -> None:
    """Wait until these groups are there and no other, and stay so."""
    wait_for(lambda: groups(cluster) == expected, PATIENCE)
    time.sleep(3)
    assert groups(cluster) == expected


def waits_and_ends(evaluation: Driver, number: signal.Signals, code: int) -> None:
    evaluation.says("waiting for 2 workers x 1 CPU for")
    assert evaluation.end(number) == code
    assert "Traceback" not in evaluation.log.read_text()


@pytest.mark.long
def test_whoever_waits_for_room_can_be_stopped_and_killed(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "search.yaml").write_text(SEARCH)
    storage = f"--run.storage={tmp_path}/runs"
    small = ["jobs/train.py", SMOKE, storage, "--run.name=small", "--train.epochs=0.1", "--cluster.workers=1"]
    alone = subprocess.run([sys.executable, *small, "--cluster.engine=process"], cwd=ROOT, check=False)
    assert alone.returncode == 0
    sweep = ["jobs/tune.py", SMOKE, f"--search={tmp_path}/search.yaml", storage, "--run.name=wide"]
    narrow = ["jobs/tune.py", SMOKE, f"--search={tmp_path}/search.yaml", storage, "--run.name=narrow"]
    evaluation = ["jobs/evaluate.py", "--engine=ray", "--workers=2", f"--checkpoint={tmp_path}/runs/small"]
    with running(Driver(cluster, tmp_path / "holder", "-c", HOLDER, "3"), "ready"):
        before = groups(cluster)

        killed = Driver(cluster, tmp_path / "killed", *sweep)
        killed.says(
            r"waiting for 2 workers x 1 CPU of t0000 for \d+ s; free: 0 of 3 CPUs; "
            r"held by job \w+, process \d+ on [\d.]+ \(3 CPU\)"
        )
        assert len(groups(cluster)) > len(before)
        assert killed.end(signal.SIGKILL) == -signal.SIGKILL
        settles(cluster, before)

        again = Driver(cluster, tmp_path / "again", *sweep)
        again.says(r"waiting for 2 workers x 1 CPU of t0000")
        assert again.end(signal.SIGTERM) == 3
        assert "stopped: 1 interrupted" in again.log.read_text()

        one = Driver(cluster, tmp_path / "one", *narrow, "--cluster.workers=1")
        one.says(r"waiting for 1 worker x 1 CPU of the next trial")
        assert one.end(signal.SIGINT) == 3
        assert "stopped: " in one.log.read_text()

        patient = ("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}')
        job = Driver(
            cluster,
            tmp_path / "job",
            *cluster.ray("job", "submit", f"--address={cluster.environment['RAY_ADDRESS']}")[1:],
            *("--working-dir", str(ROOT), "--submission-id=waits", *patient, "--"),
            *("python", "jobs/train.py", SMOKE, storage, "--run.name=job"),
        )
        job.says("waiting for 2 workers x 1 CPU of job")
        stop, since = cluster.ray("job", "stop", "waits"), time.monotonic()
        subprocess.run(stop, env=cluster.environment, check=True, capture_output=True, timeout=PATIENCE)
        job.process.wait(timeout=PATIENCE)
        print(f"job: ended {time.monotonic() - since:.1f} s after `ray job stop` began")
        assert "stopped: step 0 of 48" in job.log.read_text()

        waits_and_ends(Driver(cluster, tmp_path / "evaluates", *evaluation), signal.SIGTERM, 143)
        settles(cluster, before)
    # With room for one of two workers, the other is waited for as well.
    with running(Driver(cluster, tmp_path / "half", "-c", HOLDER, "2"), "ready"):
        before = groups(cluster)
        waits_and_ends(Driver(cluster, tmp_path / "half-waits", *evaluation), signal.SIGINT, 130)
        settles(cluster, before)


@pytest.mark.long
def test_a_start_frees_what_dead_jobs_of_ours_have_reserved_and_nothing_else(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dead = [Driver(cluster, tmp_path / name, "-c", WAITER, name, name) for name in ("ours", "theirs")]
    ours, theirs = (driver.says(r"job (\w+)")[1] for driver in dead)
    alive = Driver(cluster, tmp_path / "alive", "-c", WAITER, "ours", "alive")
    with running(alive, r"job (\w+)") as living:
        wait_for(lambda: {ours, theirs, living[1]} <= set(groups(cluster).values()))
        for driver in dead:
            assert driver.end(signal.SIGKILL) == -signal.SIGKILL
        time.sleep(5)
        assert {ours, theirs, living[1]} <= set(groups(cluster).values())
        many = ["--train.batch_size=102", "--cluster.workers=51", f"--run.storage={tmp_path}/runs"]
        start = Driver(cluster, tmp_path / "start", "jobs/train.py", SMOKE, *many)
        assert start.process.wait(timeout=START) == 2
        assert "freed 1 reservation of jobs that are dead" in start.log.read_text()
        wait_for(lambda: ours not in groups(cluster).values())
        assert {theirs, living[1]} <= set(groups(cluster).values())
    assert Driver(cluster, tmp_path / "clean", "-c", CLEANER).process.wait(timeout=START) == 0


@contextmanager
def local_driver(tmp_path: Path, *values: str, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a training outside of any cluster; its lines come by a pipe."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "jobs/train.py", SMOKE, f"--run.storage={tmp_path}/runs", *values],
        cwd=ROOT,
        env=environment | {"PYTHONUNBUFFERED": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_head_that_does_not_answer_is_left_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with local_driver(tmp_path, RAY_ADDRESS=address) as driver:
            assert driver.stdout is not None
            while "Connecting to existing Ray cluster" not in driver.stdout.readline():
                assert driver.poll() is None
            time.sleep(1)
            driver.send_signal(signal.SIGTERM)
            output, _ = driver.communicate(timeout=PATIENCE)
            assert driver.returncode == 3
            assert "stopped: step 0 of 48" in output
    wrong = {address: f"nobody answers at {address} ", "nonsense": "Invalid address format: nonsense; "}
    for given, line in wrong.items():
        with local_driver(tmp_path, RAY_ADDRESS=given) as driver:
            output, _ = driver.communicate(timeout=START)
            assert driver.returncode == 2
            assert re.search(rf"error: RAY_ADDRESS: {line}.*\n\Z", output)


@pytest.mark.long
def test_a_local_ray_is_reached_by_this_machine_only_and_ctrl_c_saves(tmp_path: Path) -> None:
    values = ("--train.epochs=200", "--checkpoint.every_steps=100000", "--train.report_every_steps=4")
    with local_driver(tmp_path, *values) as driver:
        assert driver.stdout is not None
        lines: list[str] = []
        while not lines or "step 8/" not in lines[-1]:
            lines.append(driver.stdout.readline())
            assert lines[-1], "".join(lines)
        family = descendants(driver.pid)
        listening = [address for pid in family for address in listens(pid)]
        assert len(listening) > 8  # Ray's head alone
        assert {address for address in listening if not loopback(address)} == set()
        driver.send_signal(signal.SIGINT)
        output, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 3
    assert "SIGINT: stopping after this step" in output
    assert re.search(r"^stopped: step \d+ of 3,200", output, re.MULTILINE)
    assert Checkpoints(open_store(f"{tmp_path}/runs"), "smoke").latest() is not None
    wait_for(lambda: not [pid for pid in family if Path(f"/proc/{pid}").exists()], PATIENCE)


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            child, rest = stat.read_text().split(" (", 1)
            parents.setdefault(int(rest.rpartition(") ")[2].split()[1]), []).append(int(child))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def listens(pid: int) -> list[str]:
    """Return the addresses, in the kernel's hexadecimal, at which a process awaits TCP connections."""
    inodes = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1] for row in rows if row[3] == "0A" and row[9] in inodes]


def loopback(address: str) -> bool:
    """Whether such an address is 127.0.0.0/8, also as IPv4 in IPv6, or ::1."""
    host = address.partition(":")[0]
    if len(host) == 32 and host != "00000000000000000000000001000000":
        assert host.startswith("0000000000000000FFFF0000") or host == "0" * 32, host
    return host == "00000000000000000000000001000000" or (host[-8:].endswith("7F") and host != "0" * 32)
