"""Seconds and peak memory of an evaluation, against the number of images and of samples.

    benchmarks/evaluation.py runs/fashion_mnist --data data/fashion_mnist/train
    benchmarks/evaluation.py runs/fashion_mnist --data data/fashion_mnist/train --suite samples

Each row is one run of jobs/evaluate.py, with equal numbers of images and of prior samples.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[1]


def run(options: list[str]) -> tuple[float, float]:
    """Run one evaluation; return its seconds and its peak resident memory in MB."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        command = [sys.executable, "jobs/evaluate.py", "--output", f"{folder}/report", *options]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read())
        return time.perf_counter() - began, usage.ru_maxrss / 1024


def main() -> int:
    """Print the table; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="benchmarks/evaluation.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="a data set with at least as many images")
    parser.add_argument("--suite", nargs="+", default=["quick"])
    parser.add_argument("--counts", nargs="+", type=int, default=[2_000, 10_000, 30_000])
    arguments = parser.parse_args()
    fixed = ["--checkpoint", arguments.checkpoint, "--data", arguments.data, "--suite", *arguments.suite]
    print("| images, and samples | seconds | peak RSS, MB |")
    print("|---|---|---|")
    for count in arguments.counts:
        seconds, megabytes = run([*fixed, "--samples", str(count)])
        print(f"| {count:,} | {seconds:.0f} | {megabytes:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
