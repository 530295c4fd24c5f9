"""An environment with jebm from its wheel."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "platform", "jobs")


def environment_with_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with jebm from its wheel; all other packages are those that run this test."""
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
    """Run a command of that environment in a folder."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JEBM"))}
    return subprocess.run(
        [environment / "bin/jebm", *words],
        cwd=folder,
        env=variables | {"XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
