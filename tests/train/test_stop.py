"""Ctrl-C in a run: an answer at once, everything saved, and an exit code that says that work is left."""

import signal
import subprocess
import sys
from pathlib import Path

from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store

ROOT = Path(__file__).parents[2]


def test_ctrl_c_is_answered_and_an_unfinished_run_exits_with_3(tmp_path: Path) -> None:
    values = [
        "--config=smoke",
        "--cluster.engine=process",
        "--cluster.workers=1",
        f"--run.storage={tmp_path}",
    ]
    values += ["--train.epochs=500", "--langevin.steps=2", "--train.report_every_steps=2"]
    command = [sys.executable, "-m", "jebm", "train", *values]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        while not driver.stdout.readline().startswith("step "):
            assert driver.poll() is None
        driver.send_signal(signal.SIGINT)
        output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 3, errors
    assert errors.startswith("SIGINT: stopping after this step, with a last checkpoint; ")
    assert output.endswith("the same command resumes it\n")
    newest = Checkpoints(open_store(str(tmp_path)), "smoke").latest()
    assert newest is not None
    assert f"stopped: step {newest.step} of 8,000" in output
