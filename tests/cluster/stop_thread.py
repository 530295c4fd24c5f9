"""Stop the training thread of a Ray Train worker, as a stuck driver or file system does: stop_thread.py PID.

Says `stopped`, and ends when the thread does.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

_PTRACE_ATTACH = 16
_WALL = 0x40000000  # any thread


def main(pid: str) -> None:
    """Find the thread, attach to it, which stops it, and stay."""
    dump = [str(Path(sys.executable).with_name("py-spy")), "dump", "--json", "--pid", pid]
    told = json.loads(subprocess.run(dump, check=True, capture_output=True, timeout=60).stdout)
    (thread,) = [each["os_thread_id"] for each in told if "TrainingThread" in (each["thread_name"] or "")]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(_PTRACE_ATTACH, thread, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    print("stopped", flush=True)
    status = os.waitpid(thread, _WALL)[1]
    while os.WIFSTOPPED(status):
        status = os.waitpid(thread, _WALL)[1]


if __name__ == "__main__":
    main(sys.argv[1])
