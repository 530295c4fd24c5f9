"""A real Prometheus reads a real Ray while a run trains: every query and alert of ours has data."""

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from jebm.store.storage import open_store
from ports import free_port

ROOT = Path(__file__).parents[2]
FILES = ROOT / "cluster/prometheus"
LIMIT_SECONDS = 200
PAGES = {"/": 200, "/api/authentication_mode": 200, "/api/version": 401, "/api/jobs/": 401}


def dashboard_queries() -> list[str]:
    """What the panels of the dashboard ask of the test's run: one that has ended is shown for a while."""
    dashboard = json.loads((ROOT / "cluster/grafana/jebm.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    return [target["expr"].replace("$run", "watched") for target in targets]


def alert_quantities() -> list[str]:
    """What the alerts compare with their limits."""
    rules = yaml.safe_load((FILES / "rules.yaml").read_text())["groups"][0]["rules"]
    found = [re.fullmatch(r"(.+) (==|>) [\d.]+", rule["expr"]) for rule in rules]
    assert all(found)
    return [match[1] for match in found if match]


@contextmanager
def prometheus(folder: Path, discovery: Path) -> Iterator[str]:
    """Run one with our files, and yield its address."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus here; scripts/test-long fetches Debian's")
    shutil.copy(FILES / "rules.yaml", folder)
    config = (FILES / "prometheus.yaml").read_text()
    for ours, here in (("/tmp/ray/", f"{discovery}/"), ("15s", "2s"), ("30s", "2s")):
        assert ours in config
        config = config.replace(ours, here)
    (folder / "prometheus.yaml").write_text(config)
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def code_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def ask(address: str, what: str) -> Any:
    with urllib.request.urlopen(f"{address}/api/v1/{what}", timeout=10) as answer:
        return json.loads(answer.read())["data"]


def series(address: str, query: str) -> list[dict[str, Any]]:
    """Return the labels and the value of each series that answers a query."""
    found = ask(address, f"query?{urllib.parse.urlencode({'query': query})}")["result"]
    return [each["metric"] | {"value": float(each["value"][1])} for each in found]


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        try:
            if true():
                return
        except OSError:  # it does not listen yet
            pass
        assert time.monotonic() < deadline
        time.sleep(1)


@pytest.mark.long
def test_every_query_of_the_dashboard_and_every_alert_has_data(  # type: ignore[no-untyped-def]
    cluster, s3_uri: str, tmp_path: Path
) -> None:
    checked = shutil.which("promtool")
    if checked is not None:
        subprocess.run([checked, "check", "rules", FILES / "rules.yaml"], check=True, capture_output=True)
    entry = ["python", "jobs/train.py", "--config=jobs/configs/smoke.yaml", f"--run.storage={s3_uri}"]
    entry += ["--run.name=watched", "--train.epochs=1000", "--train.report_every_steps=5"]
    entry += ["--cluster.workers=2", "--checkpoint.every_steps=20", "--train.pictures_every_steps=0"]
    patient = ("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}')
    missing = {*dashboard_queries(), *alert_quantities()}
    assert len(missing) > 25
    with (
        prometheus(tmp_path, cluster.scratch) as address,
        cluster.submit(*entry, options=("--submission-id", "watched", *patient)) as job,
    ):
        try:

            def shown(query: str, label: str = "run") -> list[dict[str, Any]]:
                """This run's series, over a minute, since a busy agent misses a turn now and then."""
                return series(address, f'last_over_time({query}{{{label}="watched"}}[1m])')

            def running() -> bool:
                states = shown("ray_train_controller_state", "ray_train_run_name")
                return any(each["value"] == 1 for each in states)

            def all_answer() -> bool:
                missing.difference_update([query for query in missing if series(address, query)])
                driver = shown("ray_jebm_distortion") and shown("ray_jebm_last_commit_time_seconds")
                both_ranks = len(shown("ray_jebm_time_data_share")) == 2
                ready = not missing and driver and both_ranks and running()
                return bool(ready) or job.poll() is not None

            wait_until(all_answer)
            assert not missing, job.stdout.read() if job.poll() is not None else missing
            # The run's own name, in Ray's metrics as well, and each rank's own figures.
            assert running()
            assert not series(address, 'ray_train_controller_state{ray_train_run_name="checkpoints"}')
            shares = shown("ray_jebm_time_data_share")
            assert {(each["run"], each["rank"]) for each in shares} == {("watched", "0"), ("watched", "1")}
            (distortion,) = shown("ray_jebm_distortion")
            (committed,) = shown("ray_jebm_last_commit_time_seconds")
            assert 0 <= time.time() - committed["value"] < LIMIT_SECONDS
            rules = ask(address, "rules")["groups"][0]["rules"]
            assert {rule["health"] for rule in rules} == {"ok"}
            # All that was without the cluster's token; the dashboard answers so much without it.
            codes = {path: code_of(cluster.environment["RAY_ADDRESS"] + path) for path in PAGES}
            assert codes == PAGES
        finally:
            stop = cluster.ray("job", "stop", "watched")
            subprocess.run(stop, env=cluster.environment, capture_output=True, check=False, timeout=150)
            output = job.communicate(timeout=120)[0]
    # What was shown is what the journal has.
    run = open_store(s3_uri).child("watched")
    rows = [json.loads(line) for line in run.get("metrics.jsonl").splitlines()]
    assert any(row["distortion"] == pytest.approx(distortion["value"], rel=1e-6) for row in rows), output
    # The logs outlive the cluster: what the job has printed, and what its first rank has logged.
    logs = {info.key.partition("-")[2]: run.get(info.key).decode() for info in run.list("logs/")}
    assert "stopped: step " in cluster.driver_log("watched")
    for line in ("starting the workers", f"step {rows[0]['step']}/", "SIGTERM: stopping"):
        assert line in logs["driver.log"]
    assert f"step {rows[-1]['step']}/" in logs["rank-00000.log"]
    # No folder but the run's own: its checkpoints lie where they lay before Ray knew its name.
    folders = {info.key.split("/")[0] for info in run.list() if "/" in info.key}
    assert folders == {"checkpoints", "lease", "logs", "pictures", "tensorboard"}
    assert {info.key.split("/")[0] for info in open_store(s3_uri).list()} == {"watched"}
