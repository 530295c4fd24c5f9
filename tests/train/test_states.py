"""All states that `jebm status` tells apart, made by real processes that wait, train, hang, stop and die."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from helpers import tiny_config

from jebm.commands import run_command
from jebm.config import Config, Energy
from jebm.training import train

STANDING = '''
import time
from pathlib import Path
import torch
from jebm.parts import Energy

HERE = Path(__file__).parent


def stand_while(name):
    while (HERE / name).exists():
        time.sleep(0.02)


class Standing(Energy):
    """Takes long to build while there is a file `building`, and to train while there is one `computing`."""

    def __init__(self, layers):
        super().__init__(layers)
        stand_while("building")
        self.net = torch.nn.Linear(sum(self.widths), 1)

    def forward(self, z):
        if len(z) > 8:  # a batch, not the check of the class
            stand_while("computing")
        return self.net(z).squeeze(1)
'''
LIMIT_SECONDS = 60


def standing_config(storage: Path, name: str) -> Config:
    config = tiny_config(
        storage,
        run__name=name,
        run__track=[],
        langevin__steps=1,
        train__epochs=0.2,
        cluster__hang_seconds=1.0,
    )
    return replace(config, energy=Energy(class_path="standing.Standing"))


@contextmanager
def job(config: Config) -> Iterator[BaseProcess]:
    """A process that trains, a fork of this one: torch is imported already."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(config,))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def until(state: str, told: Callable[[], str]) -> str:
    """Return what is told once it names the state."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while f"state       {state}, step " not in (text := told()):
        assert time.monotonic() < deadline, text
        time.sleep(0.5)
    return text


def test_each_state_is_told_while_a_real_process_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "standing.py").write_text(STANDING)
    monkeypatch.syspath_prepend(str(tmp_path))
    building, computing = tmp_path / "building", tmp_path / "computing"
    runs = tmp_path / "runs"

    def told(place: str = "runs/mine") -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["jebm", str(tmp_path / place)])
        with pytest.raises(SystemExit) as caught:
            run_command("status")
        assert caught.value.code == 0
        return capsys.readouterr().out

    config = standing_config(runs, "mine")
    building.touch()
    computing.touch()
    with job(config) as first:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not list(runs.glob("mine/lease/*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "workers     none\n" in until("waiting", told)
        building.unlink()
        assert f"(pid {first.pid}): " in until("running", told)
        assert f"(pid {first.pid}): update of step 1, " in until("hung", told)
        assert first.pid is not None
        os.kill(first.pid, signal.SIGTERM)
        computing.unlink()
        first.join(LIMIT_SECONDS)
        assert first.exitcode == 0
    until("stopped", told)
    building.touch()
    computing.touch()
    time.sleep(1.1)  # a lease tells the second in which it began
    with job(config) as second:
        deadline = time.monotonic() + LIMIT_SECONDS
        while "state       stopped, " in (text := told()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert (
            "state       waiting, " in text
        )  # what the first one's worker has said is no word of this one's
        building.unlink()
        assert f"(pid {second.pid}): " in until("running", told)
    lease = max(runs.glob("mine/lease/*.json"))
    os.utime(lease, (time.time() - 61, time.time() - 61))  # as if it had been killed a minute ago
    until("dead", told)
    computing.unlink()
    with job(standing_config(runs, "other")) as third:
        third.join(LIMIT_SECONDS)
    assert "lease       " in until("finished", lambda: told("runs/other"))
    table = {line.split()[0]: line.split()[1] for line in told("runs").splitlines()[1:]}
    assert table == {"mine": "dead", "other": "finished"}
