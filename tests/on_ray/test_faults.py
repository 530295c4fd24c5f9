"""Runs that are killed, stopped and warned, on real Ray and a real S3 server, and what they come back as."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jebm.parser import config_from_dict
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.storage import open_store
from jebm.train.runtime import Runtime
from jebm.train.state import TrainState

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
# 48 steps in mid-epoch pieces of 16, with every kind of state there is: averages, schedule, spectral norm.
VALUES = (
    "--config=jobs/configs/smoke.yaml",
    "--train.epochs=3",
    "--train.ema_decay=0.9",
    "--train.report_every_steps=4",
    "--checkpoint.every_steps=10",
    "--optimizer.generator.schedule=cosine",
    "--langevin.steps=150",  # time enough to be killed in
)


def command(storage: str, *values: str) -> list[str]:
    return [sys.executable, "jobs/train.py", *VALUES, f"--run.storage={storage}", *values]


def newest(storage: str) -> Manifest | None:
    return Checkpoints(open_store(storage), "smoke").latest()


def tensors(storage: str) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Return the newest checkpoint and its tensors."""
    manifest = newest(storage)
    assert manifest is not None
    state = TrainState.build(config_from_dict(manifest.config), Runtime(0, 1, torch.device("cpu")))
    Checkpoints(open_store(storage), "smoke").load(manifest, state.tensors())
    return manifest, state.tensors()


def assert_only_the_newest_stay(storage: str, keep_last: int) -> None:
    """Retention keeps what it says, and Ray lists the newest of these, each with its own metrics."""
    listed = Checkpoints(open_store(storage), "smoke").list()
    # A save that is killed leaves a folder without a manifest, for a day.
    manifests = {found.name: found.manifest for found in listed if found.manifest is not None}
    names = list(manifests)
    newest_manifest = manifests[names[0]]
    assert names[keep_last:] in ([], [newest_manifest.parent])
    told = json.loads(open_store(storage).get("smoke/checkpoints/checkpoint_manager_snapshot.json"))
    results = {result["checkpoint_dir_name"]: result["metrics"] for result in told["checkpoint_results"]}
    assert list(results) == names[:keep_last][::-1]
    for name, metrics in results.items():
        manifest = manifests[name]
        assert metrics == {**manifest.metrics, "step": manifest.step}


def assert_equal(one: str, other: str) -> None:
    (first, mine), (second, theirs) = tensors(one), tensors(other)
    assert first.step == second.step == 48
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def wait_for(what: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def has_step(storage: str, step: int) -> Callable[[], bool]:
    return lambda: (found := newest(storage)) is not None and found.step >= step


def local_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


def test_one_process_killed_equals_one_that_was_not(s3_uri: str) -> None:
    alone = ("--cluster.engine=process", "--cluster.workers=1")
    straight = subprocess.Popen(command(f"{s3_uri}/straight", *alone), cwd=ROOT)
    with subprocess.Popen(command(f"{s3_uri}/killed", *alone), cwd=ROOT) as killed:
        wait_for(has_step(f"{s3_uri}/killed", 20))
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert subprocess.run(command(f"{s3_uri}/killed", *alone), cwd=ROOT, check=False).returncode == 0
    assert straight.wait(timeout=120) == 0
    assert tensors(f"{s3_uri}/killed")[0].attempt == 2
    assert_equal(f"{s3_uri}/straight", f"{s3_uri}/killed")


def test_a_worker_and_the_driver_killed_equal_two_torchrun_processes(s3_uri: str, tmp_path: Path) -> None:
    storage, two = f"{s3_uri}/ray", ("--cluster.workers=2", "--cluster.max_failures=1")
    few = "--checkpoint.keep_last=2"  # so that Ray, when it starts workers again, lists some that are gone

    def start(log: Path) -> "subprocess.Popen[bytes]":
        with log.open("w") as file:
            ray = command(storage, *two, few)
            return subprocess.Popen(ray, cwd=ROOT, env=local_environment(), stdout=file, stderr=file)

    with start(tmp_path / "log") as job:
        wait_for(lambda: any(open_store(storage).list("smoke/lease/")))  # before Ray has started
        other = command(storage, "--cluster.engine=process", "--cluster.workers=1")
        refused = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert re.fullmatch(
            rf"error: run.name: \S+/smoke is in training by process {job.pid} .*\n", refused.stderr
        )
        wait_for(has_step(storage, 10))
        worker = re.search(r"RayTrainWorker pid=(\d+)", (tmp_path / "log").read_text())
        assert worker is not None
        os.kill(int(worker[1]), signal.SIGKILL)
        wait_for(lambda: (found := newest(storage)) is not None and found.attempt == 2)
        job.kill()
    with start(tmp_path / "again") as again:
        wait_for(lambda: "(TrainController pid=" in (tmp_path / "again").read_text(), 300)
        again.send_signal(signal.SIGINT)  # as Ctrl-C does: it ends, and loses nothing
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        straight = [*torchrun, *command(f"{s3_uri}/torchrun", *two)[1:]]
        assert subprocess.run(straight, cwd=ROOT, env=local_environment(), check=False).returncode == 0
        assert again.wait(timeout=300) == 3, (tmp_path / "again").read_text()
    assert f"is held by process {job.pid} on host" in (tmp_path / "again").read_text()
    assert "stopped: step" in (tmp_path / "again").read_text()
    stopped = newest(storage)
    assert stopped is not None
    with start(tmp_path / "last") as last:
        assert last.wait(timeout=300) == 0, (tmp_path / "last").read_text()
    manifest, _ = tensors(storage)
    assert (manifest.attempt, manifest.parent) == (stopped.attempt + 1, stopped.name)
    assert_equal(f"{s3_uri}/torchrun", storage)
    assert_only_the_newest_stay(storage, 2)


def test_a_run_outlives_a_node_that_was_about_to_go(cluster, s3_uri: str) -> None:  # type: ignore[no-untyped-def]
    """One worker on each of two nodes; notice is given of the end of one, and it goes."""
    values = ["--train.epochs=200", "--checkpoint.every_steps=7"]  # reports come at every fourth step
    elastic = ["--cluster.workers=2", "--cluster.min_workers=1", "--cluster.cpus_per_worker=2"]
    entry = ["python", *command(s3_uri, *values, *elastic)[1:]]

    def found(condition: Callable[[Manifest], bool], seconds: float = 150) -> Manifest:
        manifests: list[Manifest] = []

        def look() -> bool:
            if (manifest := newest(s3_uri)) is not None and condition(manifest):
                manifests.append(manifest)
            return bool(manifests)

        wait_for(look, seconds)
        return manifests[0]

    with cluster.second_node(cpus=2) as node:
        # Not followed: Ray finds the log of a job by its node's address, and these two nodes share one.
        with cluster.submit(*entry, options=("--no-wait", "--submission-id", "preempted")) as job:
            assert job.wait(timeout=60) == 0
        try:
            assert found(lambda one: one.step >= 7).world_size == 2
            node.drain(30)
            end = time.monotonic() + 25
            saved = found(lambda one: one.step % 7 != 0 and one.step % 4 == 0, 25)  # before the notice ends
            time.sleep(max(0.0, end - time.monotonic()))
            node.kill()
            alone = found(lambda one: one.attempt == 2)
            assert alone.world_size == 1
            assert alone.parent is not None
            assert alone.parent >= saved.name
        except AssertionError:
            print(cluster.driver_log("preempted"))
            raise
        finally:
            stop = cluster.ray("job", "stop", "--no-wait", "preempted")
            subprocess.run(stop, env=cluster.environment, check=True, capture_output=True)
