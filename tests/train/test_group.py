"""A process that was one of a gloo group ends well: no thread of the group outlives it.

A thread that does may drop its last tensors while the interpreter ends, and abort a run that is finished.
"""

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def end_groups(folder: Path, *ways: str) -> list[tuple[int, str, str]]:
    """Run two processes of `group_worker.py`; return the exit code and both outputs of each."""
    worker = Path(__file__).parent / "group_worker.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder), *ways],
            env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(process, *process.communicate(timeout=120)) for process in processes]
    return [(process.returncode, out, err) for process, out, err in ended]


def test_no_thread_outlives_its_group_unless_somebody_holds_it(tmp_path: Path) -> None:
    ended = ["backward: 0", "error: 0", "collective: 0"]
    for code, out, err in end_groups(tmp_path, "backward", "error", "collective", "kept", "many at once"):
        *before, said, kept, last = out.splitlines()
        assert (code, before) == (0, ended), err
        assert "something still holds the group" in said
        assert (kept, last) == ("kept: 2", "many at once: 2")  # those of the group that is held
