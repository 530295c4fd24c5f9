"""The wheel in an environment and a folder of its own: it trains on what it ships."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from doc_blocks import ROOT, TINY, blocks_of, run_blocks, shorten
from wheel_environment import environment_with_wheel, jebm


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with_wheel(tmp_path_factory)


@pytest.mark.long
def test_a_wheel_trains_on_what_it_ships_from_any_folder(environment: Path, tmp_path: Path) -> None:
    where = [environment / "bin/python", "-c", "import jebm; print(jebm.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env={}, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(environment))
    assert "  train  " in jebm(environment, tmp_path, "--help").stdout

    words = ["--config", "smoke", "--cluster.engine", "process", "--cluster.workers", "1"]
    trained = jebm(environment, tmp_path, "train", *words, "--train.epochs", "0.1")
    assert trained.returncode == 0, trained.stderr
    assert "data     jobs/data/fashion_mnist_2000/train: 1,600 images 28x28x1" in trained.stdout
    assert "finished: step 2 of 2; results in" in trained.stdout
    status = jebm(environment, tmp_path, "status", "runs/smoke").stdout
    assert "state       finished, step 2 of 2\n" in status

    sweep = ["tune", "--config", "smoke", "--search", "first", "--evaluation.every_steps", "24", "--dry-run"]
    planned = jebm(environment, tmp_path, *sweep, "--run.name", "first", "--cluster.workers", "1")
    assert planned.returncode == 0, planned.stderr
    assert "trials   6 by tpe" in planned.stdout

    doctor = jebm(environment, tmp_path, "doctor", str(tmp_path / "runs"))
    assert doctor.returncode == 0, doctor.stdout
    assert "chain kernel" in doctor.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_an_empty_folder_to_a_model_in_python(environment: Path, tmp_path: Path) -> None:
    """README's lines; `smoke` and `first` are shortened, by files of the folder, which come first."""
    for name, keys in (("configs/smoke", TINY), ("searches/first", {"trials": 2})):
        shutil.copy(ROOT / "jobs" / f"{name}.yaml", tmp_path / Path(name).name)
        shorten(tmp_path / Path(name).name, keys)
    found = blocks_of("README.md", (ROOT / "README.md").read_text("utf-8"))
    (block,) = [block for block in found if "test_wheel.py" in (block.reason or "")]
    install, *lines = block.text.splitlines(keepends=True)
    assert install.startswith("pip install 'jebm-")
    assert len(lines) < 10
    path = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": "", "RAY_ADDRESS": ""}
    output = run_blocks([replace(block, text="".join(lines))], tmp_path, path, 800)
    assert "(16, 1, 28, 28)" in output or "torch.Size([16, 1, 28, 28])" in output
