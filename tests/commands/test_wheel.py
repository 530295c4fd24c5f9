"""The wheel in an environment and a folder of its own: it trains on what it ships."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "platform", "jobs")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with jebm from its wheel; all other packages are those that run this test."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            shutil.copy(source, tree)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        str(tree),
        "--wheel-dir",
        str(tree),
    ]
    subprocess.run(build, check=True)
    (wheel,) = tree.glob("*.whl")
    place = tmp_path_factory.mktemp("environment")
    venv.create(place)
    pip = [sys.executable, "-m", "pip", "--python", place / "bin/python"]
    subprocess.run([*pip, "install", "--no-deps", "--quiet", wheel], check=True)
    # jebm's own editable install hangs on a .pth file, and those of a folder that a .pth adds are not read.
    (site,) = place.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return place


def jebm(environment: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JEBM"))}
    return subprocess.run(
        [environment / "bin/jebm", *words],
        cwd=folder,
        env=variables | {"XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


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
