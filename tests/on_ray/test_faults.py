"""Runs that are killed, stopped and warned, on real Ray and a real S3 server, and what they come back as."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jebm.parser import config_from_dict
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.storage import open_store
from jebm.train.runtime import Runtime
from jebm.train.state import TrainState

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


def assert_equal(one: str, other: str) -> None:
    (first, mine), (second, theirs) = tensors(one), tensors(other)
    assert first.step == second.step == 48
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def wait_for(what: Callable[[], bool], seconds: float = 150) -> None:
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


def test_two_ray_workers_one_killed_equal_two_torchrun_processes(s3_uri: str, tmp_path: Path) -> None:
    log = (tmp_path / "log").open("w+")
    two = ("--cluster.workers=2", "--cluster.max_failures=1")
    job = subprocess.Popen(
        command(f"{s3_uri}/ray", *two), cwd=ROOT, env=local_environment(), stdout=log, stderr=log
    )
    wait_for(has_step(f"{s3_uri}/ray", 20))
    worker = re.search(r"RayTrainWorker pid=(\d+)", (tmp_path / "log").read_text())
    assert worker is not None
    os.kill(int(worker[1]), signal.SIGKILL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    straight = [*torchrun, *command(f"{s3_uri}/torchrun", *two)[1:]]
    assert subprocess.run(straight, cwd=ROOT, env=local_environment(), check=False).returncode == 0
    assert job.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    log.close()
    manifest, _ = tensors(f"{s3_uri}/ray")
    assert (manifest.attempt, manifest.world_size) == (2, 2)
    assert manifest.parent is not None
    assert_equal(f"{s3_uri}/torchrun", f"{s3_uri}/ray")


def test_a_stopped_job_saves_and_goes_on_under_its_name(cluster, s3_uri: str) -> None:  # type: ignore[no-untyped-def]
    values = ["--train.epochs=200", "--checkpoint.every_steps=100000"]  # only the stop can save
    entry = ["python", *command(s3_uri, "--cluster.workers=2", *values)[1:]]
    # Ray kills a stopped job after 3 s unless it is told to wait.
    patient = ("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}')
    with cluster.submit(*entry, options=patient) as job:
        name, step = "", 0
        for line in job.stdout:
            if found := re.search(r"raysubmit_\w+", line):
                name = found[0]
            if found := re.search(r"step (\d+)/3200", line):
                step = int(found[1])
                if step >= 8:
                    break
        assert newest(s3_uri) is None
        began = time.monotonic()
        stopped = subprocess.run(
            cluster.ray("job", "stop", name),
            env=cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - began
        output = job.communicate(timeout=120)[0]
    assert stopped.returncode == 0, stopped.stderr
    assert seconds < 60
    manifest = newest(s3_uri)
    assert manifest is not None, output
    assert manifest.step >= step
    assert "stopped: step" in output
    code, output = cluster.run(*[word.replace("=200", "=1") for word in entry])
    assert code == 0, output
    assert f"goes on from step {manifest.step}" in output


def test_a_node_about_to_go_is_saved_in_time(cluster, s3_uri: str) -> None:  # type: ignore[no-untyped-def]
    """A second node joins, big enough for both workers; then notice is given of its end."""
    values = ["--train.epochs=200", "--checkpoint.every_steps=100000", "--cluster.cpus_per_worker=2"]
    entry = ["python", *command(s3_uri, "--cluster.workers=2", *values)[1:]]
    # Not followed: Ray finds the log of a job by its node's address, and these two nodes share one.
    with cluster.second_node(cpus=4) as drain:
        with cluster.submit(*entry, options=("--no-wait", "--submission-id", "preempted")) as job:
            assert job.wait(timeout=60) == 0
        try:
            wait_for(lambda: open_store(s3_uri).head("smoke/metrics.jsonl") is not None)
            assert newest(s3_uri) is None
            drain(90)
            wait_for(has_step(s3_uri, 1), 60)  # long before the notice ends
            manifest = newest(s3_uri)
            assert manifest is not None
            assert manifest.step < 3200  # not the last one, which every run writes
        finally:
            stop = cluster.ray("job", "stop", "--no-wait", "preempted")
            subprocess.run(stop, env=cluster.environment, check=True, capture_output=True)
