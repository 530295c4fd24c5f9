"""What is not finite is found without reading from the device, and moves nothing."""

import os
import subprocess
import sys
from operator import methodcaller
from pathlib import Path

import pytest
import torch
from finite_worker import no_reads, work

from jebm.train.finite import finite_seed
from jebm.train.runtime import Runtime

HERE = Path(__file__).parent


@pytest.mark.parametrize(("noise", "late"), [("philox", True), ("torch", False)])
def test_a_step_reads_nothing_and_names_what_is_not_finite(noise: str, late: bool) -> None:
    work(Runtime(0, 1, torch.device("cpu")), noise, late=late)


def test_two_workers_read_nothing_and_name_what_one_of_them_met(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "finite_worker.py"), "2", str(tmp_path / "meeting")]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize("read", [float, bool, torch.nonzero, methodcaller("numpy"), methodcaller("tolist")])
def test_the_guard_of_these_tests_sees_reads(read) -> None:
    with no_reads(), pytest.raises(AssertionError):
        read(torch.ones(1))


@pytest.mark.parametrize("value", [0.0, -3.5, 1e38, -torch.inf, torch.nan])
def test_a_backward_pass_begins_with_one_or_with_nan(value: float) -> None:
    seed = finite_seed(torch.tensor(value))
    assert torch.equal(seed, torch.ones(())) if abs(value) < torch.inf else seed.isnan()
