"""Data parallelism: real gloo processes against one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT

HERE = Path(__file__).parent


Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Rank 0's losses and tensors after 10 updates, by world size and noise; torch is imported once."""
    folder = tmp_path_factory.mktemp("gloo")
    names = [f"{workers}-silence" for workers in (1, 2, 3, 5)] + ["2-noise", "2-noise-again", "2-same"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{HERE.parent}"}
    command = [sys.executable, str(HERE / "gloo_worker.py"), str(folder), *names]
    subprocess.run(command, env=environment, check=True, timeout=280)
    return {name: torch.load(folder / name, weights_only=True) for name in names}


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_equal_one_with_noise_off(results: Results, workers: int) -> None:
    """Also with unequal shares of a batch of 64: 21, 21, 22 images, and 12, 13, 13, 13, 13."""
    one, several = results["1-silence"], results[f"{workers}-silence"]
    torch.testing.assert_close(several["losses"], one["losses"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(several["features"], one["features"], rtol=0, atol=1e-5)
    names = [name for name in one["tensors"] if name.startswith(("model.", "ema."))]
    assert any(name.startswith("model.energy.") for name in names)
    for name in names:
        found, expected = several["tensors"][name], one["tensors"][name]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_two_noisy_workers_repeat_themselves_exactly(results: Results) -> None:
    first, again = results["2-noise"], results["2-noise-again"]
    assert first["losses"] == again["losses"]
    assert all(torch.equal(first["tensors"][name], again["tensors"][name]) for name in first["tensors"])
    # And the ranks draw different noise: with rank 0's on both it is another run.
    assert results["2-same"]["losses"][1:] != first["losses"][1:]


def test_torchrun_ends_at_once_where_training_diverges(tmp_path: Path) -> None:
    """Nobody is left waiting: neither in a collective, nor in the destructor of gloo's group."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["jobs/train.py", "--config=jobs/configs/smoke.yaml", f"--run.storage={tmp_path}"]
    command += ["--energy.spectral_norm=false", "--energy.output_scale=1e30"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 1
    assert "diverged: loss or gradient is not finite at step 0" in ended.stderr
    assert "SIGKILL" not in ended.stderr  # which torchrun sends to a process that does not end
