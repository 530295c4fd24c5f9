"""Ray on hosts of a test, set up with the lines of cluster/README.md, and what its operator sees."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from hosts import Host, Lan, forwarded

__all__ = ["ADDRESSES", "PATIENCE", "ROOT", "THIN", "Cluster", "Log", "block"]

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster/README.md").read_text()
# The README's own; trained on are the first two, the last is the operator's.
ADDRESSES = {"h1": "192.0.2.10", "h2": "192.0.2.11", "s3": "192.0.2.20", "op": "192.0.2.30"}
SMALL = "--num-cpus=1 --object-store-memory=80000000"  # two hosts share this machine
THIN = 25
"""Mbit/s to h2: a step sends 12.5 Mbit, so that steps take half a second and no CPU while faults are made."""
PATIENCE = 300.0


def block(heading: str) -> str:
    """Return the first block of commands below a heading of the README."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0]


def line(heading: str, words: str) -> str:
    """Return the one command below a heading that contains these words, without its comment."""
    (found,) = [one for one in block(heading).splitlines() if words in one]
    return found.partition("  #")[0].rstrip()


@dataclass
class Cluster:
    net: Lan
    environment: dict[str, str]
    hosts: dict[str, Host] = field(default_factory=dict)
    tunnel: ExitStack = field(default_factory=ExitStack)

    def boot(self, name: str) -> None:
        self.hosts[name] = self.net.boot(name, ADDRESSES[name])

    def ray(self, name: str, command: str) -> str:
        """Run a line on a host, in the environment that the README gives to each `ray start`."""
        exports = line("By hand", "export RAY_AUTH")
        return self.hosts[name].run(f"{exports}; {command}", self.environment, cwd=ROOT, timeout=PATIENCE)

    def start_head(self) -> None:
        """Start Ray on the first host, and open the operator's way to its job server."""
        self.ray("h1", f"{line('By hand', '--head')} {SMALL}")
        self.tunnel.enter_context(forwarded(self.hosts["op"], "127.0.0.1", 8265, to=self.hosts["h1"]))

    def join(self) -> None:
        """Start Ray on the second host."""
        self.ray("h2", f"{line('By hand', '--address')} {SMALL}")

    def replace_second(self) -> None:
        """Start the second host again, and Ray on it."""
        self.boot("h2")
        self.net.limit(self.hosts["h2"], THIN)
        self.join()

    def as_operator(self, command: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """Start a command on the operator's host, which knows the token and the job server."""
        exports = [
            line("The token, once", "export RAY_AUTH"),
            line("Submit, follow, stop, fetch", "export RAY_ADDRESS"),
        ]
        return self.hosts["op"].shell(f"{'; '.join(exports)}; exec {command}", self.environment, cwd=ROOT)


class Log:
    """What a process prints, with the time of each line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self.lines = process, list[tuple[float, str]]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            self.lines.append((time.monotonic(), text.rstrip("\n")))

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.lines)

    def wait(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            running = self._process.poll() is None
            assert running, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.2)

    def wait_for(self, pattern: str, after: int = 0) -> None:
        """Wait for a line that holds a pattern, after so many lines."""
        self.wait(lambda: any(re.search(pattern, text) for _, text in self.lines[after:]))

    def steps(self) -> list[tuple[float, int]]:
        found = [(at, re.search(r"\bstep (\d+)/\d+ ", text)) for at, text in self.lines]
        return [(at, int(step[1])) for at, step in found if step]

    def groups(self) -> list[dict[str, tuple[int, int]]]:
        """Return the groups of workers that there were: pid and rank by address."""
        members = re.findall(r"\(ip=(\S+), pid=(\d+)\) world_rank=(\d)", self.text)
        ranks = [(address, (int(pid), int(rank))) for address, pid, rank in members]
        return [dict(ranks[first : first + 2]) for first in range(0, len(ranks) - 1, 2)]
