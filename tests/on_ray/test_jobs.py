"""`ray job submit` against a cluster with token authentication where jebm is not installed."""

import json
import os
import re
import subprocess
from pathlib import Path

from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store

# What a worker sees; then starts with bad values, dry and not, and the exit code of the last.
ODDS = """
import ray, subprocess, sys
ray.init()
@ray.remote
def look():
    import importlib.util, platform
    return platform.system(), importlib.util.find_spec('jebm') is None
print('worker says', ray.get(look.remote()))
ray.shutdown()
start = ['python', 'jobs/train.py', '--config', 'jobs/configs/smoke.yaml', '--run.storage']
def run(*words):
    return subprocess.run([*start, *words], stderr=subprocess.STDOUT).returncode
print(run('runs'), flush=True)
print(run(sys.argv[1], '--data.train', 'data/mine/train'), flush=True)
print(run(sys.argv[1], '--cluster.workers=3', '--train.batch_size=99', '--dry-run'), flush=True)
many = ['--train.batch_size', '102', '--cluster.workers', '51']
print(run(sys.argv[1], *many, '--dry-run'), flush=True)
sys.exit(run(sys.argv[1], *many))
"""


def test_a_job_stops_when_told_to_and_goes_on_under_its_name(cluster, s3_uri: str) -> None:  # type: ignore[no-untyped-def]
    missing = subprocess.run(
        [cluster.python, "-c", "import jebm"], env=cluster.environment, capture_output=True, check=False
    )
    assert b"No module named 'jebm'" in missing.stderr
    entry = ["python", "jobs/train.py", "--config=jobs/configs/smoke.yaml", f"--run.storage={s3_uri}"]
    # Only the stop can save. The steps take time enough to be stopped in.
    values = ["--train.report_every_steps=4", "--checkpoint.every_steps=100000", "--langevin.steps=150"]
    # Ray kills a stopped job after 3 s unless it is told to wait.
    patient = ("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}')
    store = open_store(s3_uri).child("smoke")
    checkpoints = Checkpoints(open_store(s3_uri), "smoke")
    with cluster.submit(*entry, *values, "--train.epochs=200", options=patient) as job:
        name, step = "", 0
        for line in job.stdout:  # the log comes while the job runs
            if found := re.search(r"raysubmit_\w+", line):
                name = found[0]
            if found := re.search(r"step (\d+)/3200", line):
                step = int(found[1])
                if step >= 8:
                    break
        assert checkpoints.latest() is None
        assert json.loads(store.get("lease/00000001.json"))["ray_job"] == name
        stop = cluster.ray("job", "stop", name)
        stopped = subprocess.run(stop, env=cluster.environment, capture_output=True, text=True, check=False)
        output = job.communicate(timeout=120)[0]
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped: step" in output
    saved = checkpoints.latest()
    assert saved is not None, output
    assert saved.step >= step
    epochs = saved.step // 16 + 2
    code, output = cluster.run(*entry, *values, f"--train.epochs={epochs}")
    assert code == 0, output
    assert f"resumes at step {saved.step:,}" in output
    assert "is held by" not in output  # who has ended frees the run at once
    assert f"finished: step {16 * epochs} of {16 * epochs}" in output
    manifest = checkpoints.latest()
    assert manifest is not None
    assert (manifest.step, manifest.world_size, manifest.parent) == (16 * epochs, 2, saved.name)
    assert manifest.provenance["machine"].startswith("Linux")
    told = json.loads(store.get("checkpoints/checkpoint_manager_snapshot.json"))
    assert {result["checkpoint_dir_name"]: result["metrics"] for result in told["checkpoint_results"]} == {
        found.name: {**found.metrics, "step": found.step} for found in (saved, manifest)
    }
    assert told["current_report_index"] == 2  # and of no other report: Ray takes two a second
    keys = [info.key for info in store.list()]
    assert {"metrics.jsonl", "run.json"} <= set(keys)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert not any(secret in store.get(key) for key in keys)
    assert secret.decode() not in output


def test_platform_is_the_standard_librarys_and_bad_values_end_with_their_line(cluster, s3_uri: str) -> None:  # type: ignore[no-untyped-def]
    code, output = cluster.run("python", "-c", ODDS, s3_uri)
    assert code == 1, output
    assert "worker says ('Linux', True)" in output
    assert re.search(r"error: run.storage: 'runs' would lie in the job's temporary folder.*\n2\n", output)
    uploaded = r"error: data.train: data/mine/train is not in the job's working directory: .*\n2\n"
    assert re.search(uploaded, output)
    assert re.search(r"workers  3 Ray workers, 1 CPU each\n(?!error)(.*\n)*?0\n", output)
    small = "cluster.workers: 51 workers of 1 CPU do not fit: the cluster has 3 CPUs"
    assert output.count(small) >= 2  # of the dry run, of the start, and where Ray shows the end again
    assert "Traceback" not in output


def test_nobody_gets_in_without_the_token(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stranger = {**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    (tmp_path / "token").write_text("f" * 64)
    refused = subprocess.run(
        cluster.ray("job", "list"), env=stranger, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "Token authentication is enabled" in refused.stderr
