"""Speed of whole runs: processes against threads, Ray against torchrun, and the time to the first step.

    benchmarks/scaling.py                                        smoke config, six ways to run it
    benchmarks/scaling.py --config jobs/configs/svhn_hierarchical.yaml --data.train data/svhn/extra

Each way is a run of jobs/train.py with the same global batch and data order. They take turns. Images per
second come from the reports after the first (metrics.jsonl): medians and quartiles over all turns. The
start-up is timed by the lines that the job prints.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[1]


class Way(NamedTuple):
    """How to start a run on two cores; one process with one thread leaves a core for Ray itself."""

    launcher: list[str]
    engine: str
    workers: int
    threads: int


_PYTHON = [sys.executable]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

WAYS = {
    "1 process, 2 threads": Way(_PYTHON, "process", 1, 2),
    "torchrun, 2 processes, 1 thread": Way([*_TORCHRUN, "2"], "process", 2, 1),
    "Ray, 1 worker, 2 threads": Way(_PYTHON, "ray", 1, 2),
    "Ray, 2 workers, 1 thread": Way(_PYTHON, "ray", 2, 1),
    "torchrun, 1 process, 1 thread": Way([*_TORCHRUN, "1"], "process", 1, 1),
    "Ray, 1 worker, 1 thread": Way(_PYTHON, "ray", 1, 1),
}

BASES = {
    "torchrun, 2 processes, 1 thread": "1 process, 2 threads",
    "Ray, 1 worker, 2 threads": "1 process, 2 threads",
    "Ray, 2 workers, 1 thread": "torchrun, 2 processes, 1 thread",
    "Ray, 1 worker, 1 thread": "torchrun, 1 process, 1 thread",
}
"""What each way is compared with."""


class Measured(NamedTuple):
    """The measurements of one run, in seconds and images per second."""

    speeds: list[float]
    plan: float
    """From the command to the plan: imports, the config, the data's manifest."""
    nets: float
    """From there to "run …: step 0": Ray if used, workers, data, nets."""
    steps: float
    """From there to the first report, minus the usual time of its later steps."""


def run(way: Way, config: Path, every: int, options: list[str]) -> Measured:
    """Do one run and return its measurements; exit with its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *way.launcher, "jobs/train.py", "--config", str(config), "--run.name", "scaling",
            "--run.storage", folder, "--cluster.engine", way.engine, "--cluster.workers", str(way.workers),
            "--cluster.cpus_per_worker", str(way.threads), "--train.report_every_steps", str(every),
            "--train.pictures_every_steps", "0", "--checkpoint.every_steps", "1000000", *options,
        ]  # fmt: skip
        # Note the times of the plan, of the nets and of the first report.
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        began = time.perf_counter()
        marks: dict[str, float] = {}
        lines: list[str] = []
        process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.append(line)
                key = "plan" if not marks else "nets" if "run scaling: step" in line else "report"
                if key != "report" or "images/s" in line:
                    marks.setdefault(key, time.perf_counter() - began)
        if process.wait():
            sys.exit("".join(lines))
        # The first report includes warm-up: leave it out.
        rows = (Path(folder) / "scaling" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        later = [json.loads(row) for row in rows[1:]]
        step = statistics.median(row["time/seconds_per_step"] for row in later)
        return Measured(
            [row["time/images_per_second"] for row in later],
            marks["plan"],
            marks["nets"] - marks["plan"],
            marks["report"] - marks["nets"] - (every - 1) * step,
        )


def main() -> int:
    """Print the table; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="benchmarks/scaling.py",
        description=__doc__.splitlines()[0],
        epilog="Any other option goes to jobs/train.py, as --train.epochs 3.",
    )
    parser.add_argument("--config", type=Path, default=_ROOT / "jobs" / "configs" / "smoke.yaml")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--every", type=int, default=10, help="steps of a report")
    arguments, options = parser.parse_known_args()
    # The ways take turns; then one row for each.
    seen: dict[str, list[Measured]] = {name: [] for name in arguments.ways}
    for _ in range(arguments.turns):
        for name, found in seen.items():
            found.append(run(WAYS[name], arguments.config, arguments.every, options))
    print("| | images/s | quartiles | against | to the plan, s | to the nets, s | to the first step, s |")
    print("|---|---|---|---|---|---|---|")
    medians: dict[str, float] = {}
    for name, found in seen.items():
        speeds = [speed for measured in found for speed in measured.speeds]
        low, medians[name], high = statistics.quantiles(speeds, n=4)
        base = BASES.get(name)
        ratio = f"{medians[name] / medians[base]:.2f} of {base}" if base in medians else ""
        ways = (statistics.median(getattr(m, part) for m in found) for part in ("plan", "nets", "steps"))
        print(
            f"| {name} | {medians[name]:.0f} | {low:.0f} to {high:.0f} | {ratio} | "
            + " | ".join(f"{seconds:.1f}" for seconds in ways)
            + " |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
