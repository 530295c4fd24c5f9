"""Training on Ray from Python: reports reach the caller's callback, which may stop the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, jebm

values = {"run.storage": sys.argv[1], "cluster.workers": 1, "train.epochs": 500, "langevin.steps": 2}
config = jebm.load_config("jobs/configs/smoke.yaml", values)
seen = []

def on_report(report):
    seen.append((report.step, report.metrics["distortion"]))
    return report.step >= 30

result = jebm.fit(config, on_report=on_report)
print([step for step, _ in seen], result.status, result.step, flush=True)
assert [step for step, _ in seen][:3] == [10, 20, 30]
assert len({step for step, _ in seen}) == len(seen)
assert result.status == "stopped early" and 30 <= result.step < 8000

def failing(report):
    raise ZeroDivisionError("mine")

try:
    jebm.fit(config, on_report=failing)
except ZeroDivisionError:
    print("raised", flush=True)
print(jebm.fit(jebm.override(config, {"train.epochs": 1})).status)
"""


@pytest.mark.long
def test_a_callback_in_the_driver_stops_workers_and_its_error_comes_back(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "runs")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": "platform"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == ["raised", "already finished"]
