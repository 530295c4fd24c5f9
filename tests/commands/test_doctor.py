"""What `jobs/doctor.py` says of the machine: which kernel computes chains, and the remedy if it is slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("cc", "ok    chain kernel     C kernel (compiled by cc)"),
        (None, "warn  chain kernel     torch (no C kernel: no C compiler found); install a C compiler"),
        ("false", "warn  chain kernel     torch (no C kernel: "),
    ],
)
def test_the_doctor_says_which_kernel_this_machine_would_use(
    compiler: str | None, said: str, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    if compiler != "cc":
        environment["PATH"] = str(tmp_path)
    if compiler == "false":
        environment["CC"] = "/bin/false"
    done = subprocess.run(
        [sys.executable, "jobs/doctor.py", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[0].startswith(said)
    assert done.returncode == 0
