"""Which Python the scripts install into: the newest on the path that can make an environment."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = Path(__file__).resolve().parents[1] / "scripts" / "common.sh"
REAL = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")


@pytest.mark.parametrize(
    ("present", "unusable", "expected"),
    [
        (["python3.11", "python3.12", "python3"], [], "python3.12"),
        (["python3.11", "python3"], ["python3.13"], "python3.11"),
        (["python3"], [], "python3"),
        ([], ["python3"], None),
        ([], [], None),
    ],
)
def test_the_newest_usable_python_is_taken(
    tmp_path: Path, present: list[str], unusable: list[str], expected: str | None
) -> None:
    dirname = shutil.which("dirname")
    assert dirname is not None
    (tmp_path / "dirname").symlink_to(dirname)
    for name in present:
        (tmp_path / name).symlink_to(REAL)
    for name in unusable:  # what a Python before 3.11, or without venv, answers to the script's question
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)

    command = ["/bin/bash", "-euo", "pipefail", "-c", f". {COMMON}; newest_python"]
    path = {"PATH": str(tmp_path)}
    done = subprocess.run(command, env=path, check=False, capture_output=True, text=True)

    if expected:
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / expected}\n")
    else:
        assert done.returncode == 2
        assert done.stderr.startswith("error: no Python from 3.11 on")
        assert "apt-get install" in done.stderr
