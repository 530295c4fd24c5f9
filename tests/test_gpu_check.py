"""scripts/gpu-check, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu-check"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=800)


def test_without_a_gpu_it_says_in_one_line_what_it_lacks() -> None:
    ended = run()
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: torch {torch.__version__} finds no CUDA device; --cpu rehearses without one\n"
    )


@pytest.mark.long
def test_a_rehearsal_goes_through_all_of_it(tmp_path: Path) -> None:
    ended = run("--cpu", "--output", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert found["kernels"]["hs, philox"]["largest difference"] < 1e-4
    assert found["power iterations"]["512 x 512"] == {"kernel": "torch", "largest difference": 0.0}
    assert found["nothing waits"] == {"steps": 6}
    assert found["compiled"]["hs_small, largest relative difference of losses"] < 1e-4
    assert found["one process"] == {"backend": "gloo"}
    assert found["snapshot and restore"]["megabytes"] > 1
    assert found["chains"]["fashion, 4"]["released loop"] > 0
    assert set(found["steps"]["hs_small"]) == {"released fp32", "ours fp32"}
    page = (tmp_path / "gpu-check.md").read_text()
    assert "| released loop |" in page
    assert "## snapshot and restore" in page
