"""`ray job submit` against a cluster with token authentication where jebm is not installed."""

import os
import subprocess
from pathlib import Path

from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store

WORKER = """
import ray
ray.init()
@ray.remote
def look():
    import importlib.util, platform
    return platform.system(), importlib.util.find_spec("jebm") is None
print("worker says", ray.get(look.remote()))
"""


def test_a_submitted_job_trains_into_s3(cluster, s3_uri: str) -> None:  # type: ignore[no-untyped-def]
    missing = subprocess.run(
        [cluster.python, "-c", "import jebm"], env=cluster.environment, capture_output=True, check=False
    )
    assert b"No module named 'jebm'" in missing.stderr
    config = ("--config", "jobs/configs/smoke.yaml", "--train.epochs", "4")
    with cluster.submit("python", "jobs/train.py", *config, "--run.storage", s3_uri) as job:
        lines, streamed = [], False
        for line in job.stdout:
            lines.append(line)
            if "step 10/64" in line:  # the log comes while the job runs: its last checkpoint is not there
                found = Checkpoints(open_store(s3_uri), "smoke").latest()
                streamed = found is None or found.step < 64
        code = job.wait(timeout=60)
    output = "".join(lines)
    assert code == 0, output
    assert streamed, output
    assert "finished: step 64 of 64" in output
    store = open_store(s3_uri)
    manifest = Checkpoints(store, "smoke").latest()
    assert manifest is not None
    assert (manifest.step, manifest.world_size) == (64, 2)
    assert manifest.provenance["machine"].startswith("Linux")
    keys = [info.key for info in store.list()]
    assert {"smoke/metrics.jsonl", "smoke/run.json"} <= set(keys)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert not any(secret in store.get(key) for key in keys)
    assert secret.decode() not in output


def test_platform_is_the_standard_librarys_in_a_worker(cluster) -> None:  # type: ignore[no-untyped-def]
    code, output = cluster.run("python", "-c", WORKER)
    assert code == 0, output
    assert "worker says ('Linux', True)" in output


def test_bad_values_end_the_job_with_their_line(cluster, s3_uri: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    common = ("python", "jobs/train.py", "--config", "jobs/configs/smoke.yaml", "--run.storage")
    code, output = cluster.run(*common, s3_uri, "--train.batch_size", "102", "--cluster.workers", "51")
    assert code == 1, output
    assert "cluster.workers: 51 workers of 1 CPU do not fit: the cluster has 3 CPUs" in output
    assert "Traceback" not in output
    code, output = cluster.run(*common, "runs")
    assert code == 1, output
    assert "run.storage: 'runs' would lie in the job's temporary folder" in output


def test_nobody_gets_in_without_the_token(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stranger = {**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    (tmp_path / "token").write_text("f" * 64)
    refused = subprocess.run(
        cluster.ray("job", "list"), env=stranger, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "Token authentication is enabled" in refused.stderr
