"""A rank that stands still is named, and the group ends; whoever is busy is left in peace."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from jebm.train.watch import HUNG


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
