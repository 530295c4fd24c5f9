"""A rank that stands still is named, and the group ends; whoever is busy is left in peace."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from jebm.train.runtime import Runtime
from jebm.train.watch import HUNG, Watch
from ports import free_port


def start(folder: Path, way: str) -> "list[subprocess.Popen[str]]":
    """Start two ranks, of which one stands still in this way: the second, unless it is the store's keeper."""
    worker = Path(__file__).parent / "watch_worker.py"
    folder.mkdir()
    meeting = f"file://{folder}/meeting"
    if way.startswith("keeper"):  # of the store, as rank 0 is without a launcher
        meeting = f"tcp://127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), meeting, way],
            env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def ends(ranks: "list[subprocess.Popen[str]]", way: str) -> list[tuple[int, str]]:
    """Return the code and output of each rank; one that is stopped is killed when the other has ended."""
    waits, still = reversed(ranks) if way.startswith("keeper") else ranks
    said: dict[int, str] = {}
    try:
        said[waits.pid] = waits.communicate(timeout=120)[0]
        if way in ("process", "at once") or way.startswith("keeper"):
            still.kill()
        said[still.pid] = still.communicate(timeout=120)[0]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, said[rank.pid]) for rank in ranks]


def test_a_process_that_nothing_restarts_only_says_so(caplog: pytest.LogCaptureFixture) -> None:
    published: list[bool] = []

    def wait_for(hung: bool) -> None:
        published.clear()
        deadline = time.monotonic() + 300
        while hung not in published:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with Watch(Runtime(0, 1, torch.device("cpu")), 0.8, lambda: False) as watch:
        watch.publish = lambda ranks, hung: published.append(hung)
        for step in range(3):
            watch.at(step, "images")
            watch.at(step, "update")
        wait_for(True)
        assert "no progress at step 2 (update) for " in caplog.text
        assert "in wait_for: time.sleep(0.05)" in caplog.text
        watch.at(3, "update")
        wait_for(False)
        with watch.busy("an evaluation"):
            caplog.clear()
            time.sleep(2)
        assert not caplog.text


def test_a_rank_that_stands_still_is_named_with_its_stack(tmp_path: Path) -> None:
    """All at once, since they mostly wait."""
    ways = ("no", "thread", "gil", "process")
    groups = {way: start(tmp_path / way, way) for way in (*ways, "at once")}
    found = {way: ends(group, way) for way, group in groups.items()}
    for code, said in found["no"]:
        assert (code, said) == (0, "step 0\nstep 1\nstep 2\nstep 3\nstep 4\nend\n")
    for way in ways[1:]:
        (code, said), (other, stack) = found[way]
        # Both of two that can tell end, and the second may find the first gone.
        assert code == HUNG or (way == "thread" and "Connection closed by peer" in said), said
        assert "step 2\nno progress" in said  # an evaluation longer than the limit was no reason
        named = re.search(
            r"no progress at step 3 \(update\) for \d+ s, .*: rank 1 on (\S+) \(pid \d+\) (.*); ", said
        )
        assert named is not None, said
        assert named[1] == socket.gethostname()
        assert "all_reduce" in said  # where the others wait for it
        behind = way == "thread"
        assert named[2] == ("is behind the others, at images of step 3" if behind else "no longer answers")
        # The timer in C prints the stack of a thread that holds the GIL, and ends the process.
        codes = {"thread": HUNG, "gil": 1, "process": -signal.SIGKILL}
        assert other == codes[way], stack
        assert ("in stand_still" in stack) == (way != "process")
    # It may not have said a word before it stood still.
    (code, said), _ = found["at once"]
    assert code == HUNG
    named = r"(rank 1 on \S+ \(pid \d+\) no longer answers|no word has come from rank 1); "
    assert re.search(rf"no progress at step 0 \(update\) for \d+ s, before any .*: {named}", said), said


def test_a_rank_that_keeps_the_store_is_named_too(tmp_path: Path) -> None:
    """Stopped as a whole, it answers no request: each of the others finds that out, in a save as well."""
    ways = {"keeper": "update", "keeper, others busy": "a save"}
    groups = {way: start(tmp_path / way, way) for way in ways}
    for way, doing in ways.items():
        (code, _), (other, said) = ends(groups[way], way)
        assert (code, other) == (-signal.SIGKILL, HUNG), said
        keeper = rf"rank 0 on {re.escape(socket.gethostname())} \(pid {groups[way][0].pid}\) or its launcher"
        named = rf"no progress at step 3 \({doing}\) for \d+ s, .*: {keeper}, .*no longer answers; "
        assert re.search(named, said), said
        assert "all_reduce" in said
