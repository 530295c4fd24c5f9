"""A sweep on a real cluster and a real S3 server, killed in the middle; the same command goes on with it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from jebm.parser import load_config
from jebm.store.checkpoint import Checkpoints, Manifest
from jebm.store.storage import ObjectMissingError, Store, open_store

ROOT = Path(__file__).parents[2]
# In the grid's order, one after the other: a good one; one whose second step is not finite; one that is
# better at each rung; and one that learns nothing.
SEARCH = """
space:
  optimizer.generator.lr: [choice, [3e-3, 1e30, 1e-2, 1e-6]]
objective: {metric: distortion, direction: minimize}
sampler: grid
scheduler: {asha: {grace_images: 512, reduction: 2}}
max_concurrent: 1
"""
VALUES = {
    "run.name": "sweep",
    "inference.channels": "[4, 8]",
    "inference.width": "32",
    "generator.channels": "[4, 8]",
    "generator.width": "32",
    "energy.width": "16",
    "langevin.steps": "80",  # time enough to be killed in
    "train.batch_size": "64",
    "train.epochs": "2.56",  # 64 steps
    "train.report_every_steps": "4",
    "checkpoint.every_steps": "4",
    "cluster.workers": "1",
}


def command(search: Path, storage: str, **more: str) -> list[str]:
    values = (
        VALUES | {"run.storage": storage} | {key.replace("__", "."): value for key, value in more.items()}
    )
    keys = [f"--{key}={value}" for key, value in values.items()]
    return ["jobs/tune.py", "--config=jobs/configs/smoke.yaml", f"--search={search}", *keys]


def trials_of(store: Store, folder: Path) -> list[FrozenTrial]:
    """Return what the sweep's journal says to Optuna alone."""
    try:
        (folder / "study.log").write_bytes(store.get("study.log"))
    except ObjectMissingError:
        return []
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    return optuna.load_study(study_name="sweep", storage=storage).trials


def newest(store: Store, trial: FrozenTrial) -> Manifest | None:
    return Checkpoints(store.child("trials"), trial.user_attrs["run"]).latest()


def test_a_killed_sweep_goes_on_and_repeats_nothing(cluster, s3_uri: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    search, log = tmp_path / "search.yaml", tmp_path / "log"
    search.write_text(SEARCH)
    store = open_store(f"{s3_uri}/sweep")
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
    python = str(cluster.python)

    with log.open("w") as lines:
        driver = subprocess.Popen(
            [python, *command(search, s3_uri)], cwd=ROOT, env=environment, stdout=lines, stderr=lines
        )
    deadline = time.monotonic() + 300
    while True:  # until one trial has finished, and another can go on from a checkpoint
        before = trials_of(store, tmp_path)
        running = [trial for trial in before if trial.state == TrialState.RUNNING]
        begun = [found for trial in running if (found := newest(store, trial)) and found.step < 40]
        if begun and any(trial.state == TrialState.COMPLETE for trial in before):
            break
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    driver.kill()
    driver.wait()

    before = trials_of(store, tmp_path)
    saved = {trial.number: newest(store, trial) for trial in before if trial.state == TrialState.RUNNING}
    killed = datetime.now(UTC)
    # The next start watches the dead driver's lease for a while: time for one that no cluster could hold.
    with subprocess.Popen(
        [python, *command(search, s3_uri, run__name="wide", cluster__workers="4")],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as wide:
        code, output = cluster.run("python", *command(search, s3_uri))
        refusal = wide.communicate(timeout=60)[1].splitlines()[-1]
    assert wide.returncode == 2
    assert refusal.startswith("error: cluster.workers: 4 workers of 1 CPU do not fit")
    assert code == 0, output
    assert "(goes on)" in output
    after = trials_of(store, tmp_path)
    statuses = [trial.user_attrs["status"] for trial in after]
    assert statuses == ["finished", "diverged", "finished", "pruned"], output
    assert [trial.params["optimizer.generator.lr"] for trial in after] == [3e-3, 1e30, 1e-2, 1e-6]
    for old, new in zip(before, after, strict=False):
        if old.state != TrialState.RUNNING:
            assert new == old  # to its times of start and end
            continue
        assert old.intermediate_values.items() <= new.intermediate_values.items()
        checkpoint, last = saved[old.number], newest(store, new)
        if checkpoint is not None and "status" not in old.user_attrs:  # it has one when it is to be pruned
            assert last is not None
            if last.attempt == 1:  # it had reached its end before it noticed that its driver was gone
                assert last.step == 64
                assert last.created < killed + timedelta(seconds=10)  # within the wait for the dead lease
                continue
            assert last.parent is not None
            assert (last.attempt, new.user_attrs["attempts"]) == (2, 2)
            assert checkpoint.name <= last.parent < "step-00000064"
    assert any(saved.values())
    finished = [trial for trial in after if trial.state == TrialState.COMPLETE]
    for trial in finished:
        assert (trial.user_attrs["step"], trial.user_attrs["images"]) == (64, 4096)
        assert trial.value == trial.intermediate_values[4096]
        steps = [found.step for found in Checkpoints(store.child("trials"), trial.user_attrs["run"]).list()]
        assert steps[:3] == [64, 60, 56]
        assert len(steps) <= 3 + (trial.user_attrs["attempts"] > 1)  # what it was resumed from stays

    keys = [info.key for info in store.list()]
    assert not any(secret.encode() in store.get(key) for key in keys)
    assert not any(key.endswith(".pkl") for key in keys)
    assert secret not in output
    assert secret not in log.read_text()
    session = re.search(r"/[\w./-]+/session_[\w-]+", (cluster.folder / "log").read_text())
    assert session is not None
    logs = [path for path in Path(session[0], "logs").rglob("*") if path.is_file()]
    assert "runtime_env_agent.log" in {path.name for path in logs}  # it shows what Ray's processes are given
    assert not [path for path in logs if secret.encode() in path.read_bytes()]
    assert {"best.yaml", "sweep.json", "study.log", "report/report.html"} <= set(keys)
    (tmp_path / "best.yaml").write_bytes(store.get("best.yaml"))
    best = load_config(tmp_path / "best.yaml")
    assert (best.run.name, best.run.storage) == ("sweep-best", s3_uri)
    assert best.optimizer.generator.lr == min(finished, key=value).params["optimizer.generator.lr"]


def value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


@pytest.mark.long
def test_a_trial_leaves_a_node_that_is_about_to_go_and_is_not_charged(  # type: ignore[no-untyped-def]
    cluster, s3_uri: str, tmp_path: Path
) -> None:
    """One node has room for the trial; as no failure is allowed, a charged trial would have failed."""
    search, log, store = tmp_path / "search.yaml", tmp_path / "log", open_store(f"{s3_uri}/sweep")
    search.write_text(SEARCH.replace("[3e-3, 1e30, 1e-2, 1e-6]", "[3e-3]"))
    values = {"cluster__cpus_per_worker": "4", "cluster__max_failures": "0", "train__epochs": "500"}
    arguments = command(search, s3_uri, **values, checkpoint__every_steps="1000000")

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not what():
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)

    with cluster.second_node(cpus=4) as node, log.open("w") as lines:
        driver = subprocess.Popen(
            [str(cluster.python), *arguments],
            cwd=ROOT,
            env=cluster.environment | {"RAY_ADDRESS": cluster.address},
            stdout=lines,
            stderr=lines,
        )
        try:
            wait_for(lambda: any(trial.user_attrs.get("step") for trial in trials_of(store, tmp_path)))
            node.drain(60)
            left = r"its node is about to go\n(.*\n)*waiting for 1 worker x 4 CPUs of the next trial"
            wait_for(lambda: re.search(left, log.read_text()) is not None)
            driver.send_signal(signal.SIGINT)
            assert driver.wait(timeout=60) == 3, log.read_text()
        finally:
            driver.kill()
    (trial,) = trials_of(store, tmp_path)
    assert (trial.state, trial.user_attrs["attempts"]) == (TrialState.RUNNING, 1)
    saved = newest(store, trial)
    assert saved is not None
    assert saved.step > 0
    assert "stopped: 1 interrupted" in log.read_text()


@pytest.mark.long
def test_a_sweep_on_a_local_ray_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    search = tmp_path / "search.yaml"
    search.write_text(
        SEARCH.replace("[3e-3, 1e30, 1e-2, 1e-6]", "[3e-3]").replace("512, reduction", "64, reduction")
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    arguments = command(search, str(tmp_path / "runs"), langevin__steps="2", train__epochs="0.16")
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "best     t0000: distortion" in ended.stdout
    assert "GCS" not in ended.stdout + ended.stderr
