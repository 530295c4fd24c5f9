"""A rank that stands still is named, and the group ends; whoever is busy is left in peace."""

import os
import re
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


def run(folder: Path, way: str) -> list[tuple[int, str, str]]:
    """Return how each of the two ranks ended: code, output, errors; a stopped rank is killed at the end."""
    worker = Path(__file__).parent / "watch_worker.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder), way],
            env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        first = ranks[0].communicate(timeout=120)
        if way == "process":
            ranks[1].kill()
        second = ranks[1].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *said) for rank, said in zip(ranks, (first, second), strict=True)]


def test_a_process_that_nothing_restarts_only_says_so(caplog: pytest.LogCaptureFixture) -> None:
    published: list[bool] = []

    def wait_for(hung: bool) -> None:
        published.clear()
        deadline = time.monotonic() + 60
        while hung not in published:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with Watch(Runtime(0, 1, torch.device("cpu")), 0.8, lambda: False) as watch:
        watch.publish = lambda ranks, hung: published.append(hung)
        for step in range(3):
            watch.at(step, "update")
        wait_for(True)
        assert "no progress at step 2 (update) for 1 s" in caplog.text
        assert "in wait_for: time.sleep(0.05)" in caplog.text
        watch.at(3, "update")
        wait_for(False)
        with watch.busy("an evaluation"):
            caplog.clear()
            time.sleep(2)
        assert not caplog.text


def test_a_rank_that_moves_is_left_in_peace(tmp_path: Path) -> None:
    for code, out, err in run(tmp_path, "no"):
        assert (code, out.split()[-1], err) == (0, "end", "")


@pytest.mark.parametrize("way", ["thread", "gil", "process"])
def test_a_rank_that_stands_still_is_named_with_its_stack(tmp_path: Path, way: str) -> None:
    (code, said, _), (other, *told) = run(tmp_path, way)
    stack = "".join(told)
    assert "step 2\nno progress" in said  # an evaluation longer than the limit was no reason
    assert code == HUNG
    named = re.search(
        r"no progress at step 3 \(update\) for \d+ s, .*: rank 1 on (\S+) \(pid \d+\) (.*); ", said
    )
    assert named is not None, said
    assert named[1] == socket.gethostname()
    assert "all_reduce" in said  # where the others wait for it
    if way == "thread":
        assert named[2] == "is behind the others, at images of step 3"
        assert (other, "in stand_still" in stack) == (HUNG, True)
    else:
        assert named[2] == "no longer answers"
    if way == "gil":  # the timer in C has printed it, and ended the process
        assert (other, "in stand_still" in stack) == (1, True)
