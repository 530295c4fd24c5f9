"""The cost of a slow network per step, and how much of it is hidden: two processes, a wire of a given rate.

    benchmarks/network.py                               smoke config, three rates and no limit
    benchmarks/network.py --rates 100               without a limit, and 100 Mbit/s
    benchmarks/network.py --config jobs/configs/fashion_mnist.yaml --train.epochs 0.4 --train.gaussian_share 0

Needs Linux and root. Two network namespaces act as two machines: a veth pair connects them, and a token
bucket (tc-tbf) limits what each may send. In each, torchrun starts one process of jobs/train.py with one
thread. There is one run: the rates take turns and change at each report. Wire: the bytes that a rank sends
per step, headers included, as its queue counts them, divided by the rate. Extra: the step time minus that
without a limit in the same turn. Hidden: the share of the wire's time that does not show, 1 - extra / wire.
Figures are medians over the turns. The wire has low bandwidth but no added delay.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from plots import draw  # type: ignore[import-not-found, unused-ignore]

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[1]
_BURST = 64_000
"""Bytes that an idle queue lets through at once."""


class Measured(NamedTuple):
    """The steps between two reports."""

    seconds: float
    """Per step."""
    speed: float
    """Images per second."""
    chains: float
    """Seconds per step in chains, including those of the energy's further updates."""
    sent: float
    """Bytes per step and rank."""


class Wire:
    """Two network namespaces, `names`, and a veth pair between them: rank r has address 10.0.0.<r + 1>."""

    device = "veth"

    def __init__(self) -> None:
        self.names = [f"jebm-{os.getpid()}-{rank}" for rank in range(2)]

    def __enter__(self) -> "Wire":
        try:
            for name in self.names:
                _tool("ip", "netns", "add", name)
            first, second = self.names
            _tool(
                "ip", "link", "add", self.device, "netns", first,
                "type", "veth", "peer", "name", self.device, "netns", second,
            )  # fmt: skip
            for rank, name in enumerate(self.names):
                _tool("ip", "-n", name, "address", "add", f"10.0.0.{rank + 1}/24", "dev", self.device)
                for device in ("lo", self.device):
                    _tool("ip", "-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what still runs in the namespaces, and remove them, which removes the pair."""
        there = _tool("ip", "netns", "list").split()
        for name in (name for name in self.names if name in there):
            for process in _tool("ip", "netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            _tool("ip", "netns", "delete", name)

    def limit(self, megabits: int) -> None:
        """Limit each side to `megabits` per second; 0 is no limit."""
        limited = ["tbf", "rate", f"{megabits}mbit", "burst", str(_BURST), "latency", "400ms"]
        for name in self.names:
            queue = limited if megabits else ["pfifo"]
            _tool("tc", "-n", name, "qdisc", "replace", "dev", self.device, "root", *queue)

    def sent(self) -> float:
        """Return the bytes sent through a side's queue, the mean of both sides."""
        counts: list[int] = []
        for name in self.names:
            queue = _tool("tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", self.device)
            counts.append(json.loads(queue)[0]["bytes"])
        return statistics.mean(counts)


def _tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def run(
    wire: Wire, folder: Path, rates: list[int], config: Path, every: int, options: list[str]
) -> dict[int, list[Measured]]:
    """Return {rate: measurements of its turns} of a run in `folder`; exit if it fails."""
    wire.limit(rates[0])
    arguments = [
        "jobs/train.py", "--config", str(config), "--run.name", "network", "--run.storage", str(folder),
        "--cluster.engine", "process", "--cluster.workers", "2", "--cluster.cpus_per_worker", "1",
        "--train.report_every_steps", str(every), "--train.pictures_every_steps", "0",
        "--checkpoint.every_steps", "1000000", *options,
    ]  # fmt: skip
    # One torchrun in each namespace.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["GLOO_SOCKET_IFNAME"] = wire.device
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--master-addr", "10.0.0.1", "--master-port", "29500",
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *launcher, "--node-rank", str(rank), *arguments],
            cwd=_ROOT,
            env=environment,
            text=True,
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, name in enumerate(wire.names)
    ]
    # Change the rate at each report, between two steps.
    lines: list[str] = []
    sent: list[float] = []
    before = 0.0
    output = processes[0].stdout
    assert output is not None
    with output:
        for line in output:
            lines.append(line)
            if "images/s" in line:  # both ranks now run the next chain and send nothing
                sent.append(wire.sent() - before)
                wire.limit(rates[(len(sent) - 1) % len(rates)])
                before = wire.sent()
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("".join(lines))
    # Assign the reports to the rates.
    rows = (folder / "network" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(row) for row in rows]
    turns = (len(found) - 1) // len(rates)
    if turns < 2:
        sys.exit(
            f"reports: {len(found)}, too few for {len(rates)} rates; more --train.epochs or a smaller --every"
        )
    seen: dict[int, list[Measured]] = {megabits: [] for megabits in rates}
    for i in range(1, 1 + turns * len(rates)):  # the steps before the first report are warm-up
        step = found[i]["time/seconds_per_step"]
        seen[rates[(i - 1) % len(rates)]].append(
            Measured(
                step,
                found[i]["time/images_per_second"],
                step * found[i]["time/chain_share"],
                sent[i] / (found[i]["step"] - found[i - 1]["step"]),
            )
        )
    return seen


def extra(seen: dict[int, list[Measured]], megabits: int) -> list[float]:
    """Return how many seconds longer a step is than without a limit, for each turn."""
    return [limited.seconds - free.seconds for limited, free in zip(seen[megabits], seen[0], strict=True)]


def wire_seconds(seen: dict[int, list[Measured]], megabits: int) -> float:
    """Return the seconds that the wire alone needs for a step's bytes."""
    return statistics.median(turn.sent for turn in seen[megabits]) * 8 / (megabits * 1e6)


def table(seen: dict[int, list[Measured]]) -> Iterator[str]:
    """Yield the table's lines, with quartiles in parentheses."""
    yield (
        "| Mbit/s | images/s | step, ms | chains, ms | sent per step, MB | wire, ms | extra, ms | hidden "
        "| times the step without a limit |"
    )
    yield "|---" * 9 + "|"
    free = statistics.median(turn.seconds for turn in seen[0])
    for megabits, turns in seen.items():
        step = statistics.median(turn.seconds for turn in turns)
        chains = statistics.median(turn.chains for turn in turns)
        sent = statistics.median(turn.sent for turn in turns)
        cells = [
            str(megabits or "no limit"),
            f"{statistics.median(turn.speed for turn in turns):.0f}",
            _quartiles([turn.seconds for turn in turns]),
            f"{1e3 * chains:.1f}",
            f"{sent / 1e6:.2f}",
        ]
        if megabits:
            wire, longer = wire_seconds(seen, megabits), extra(seen, megabits)
            share = 1 - statistics.median(longer) / wire
            cells += [f"{1e3 * wire:.1f}", _quartiles(longer), f"{share:.0%}", f"{step / free:.2f}"]
        yield f"| {' | '.join([*cells, '', '', '', ''][:9])} |"


def _quartiles(seconds: list[float]) -> str:
    low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def plot(seen: dict[int, list[Measured]], config: Path, folder: Path) -> None:
    """Draw the extra time of a step against the rate, with the wire's time."""
    rates = [megabits for megabits in seen if megabits]
    draw(
        folder / f"network-{config.stem}.svg",
        f"Time that the network adds to a step of {config.stem} against its rate",
        "Mbit/s",
        "milliseconds of a step",
        rates,
        {
            "extra": [1e3 * statistics.median(extra(seen, megabits)) for megabits in rates],
            "the wire alone": [1e3 * wire_seconds(seen, megabits) for megabits in rates],
        },
    )


def main() -> int:
    """Print the table; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="benchmarks/network.py",
        description=__doc__.splitlines()[0],
        epilog="Any other option goes to jobs/train.py, as --train.epochs 3.",
    )
    parser.add_argument("--config", type=Path, default=_ROOT / "jobs" / "configs" / "smoke.yaml")
    parser.add_argument(
        "--rates", nargs="+", type=int, default=[1000, 250, 100], help="Mbit/s, beside no limit"
    )
    parser.add_argument("--every", type=int, default=3, help="steps of a turn")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw it, too")
    arguments, options = parser.parse_known_args()
    # What this benchmark needs from the machine.
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        print(f"error: no {' and no '.join(missing)} on this machine; install iproute2", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("error: network namespaces need root; run it with sudo", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces are removed
    rates = [0, *(megabits for megabits in arguments.rates if megabits)]
    try:
        with tempfile.TemporaryDirectory() as folder, Wire() as wire:
            seen = run(wire, Path(folder), rates, arguments.config, arguments.every, options)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(seen)))
    if arguments.plot is not None:
        plot(seen, arguments.config, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
