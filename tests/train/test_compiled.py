"""`train.compile`: the same training but for rounding, or one line that says why not."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from torch import Tensor
from torch._dynamo.utils import counters

from forked import exit_code
from jebm import config as config_of
from jebm.core.parts import Energy
from jebm.errors import ConfigError
from jebm.train.group import process_group
from jebm.train.loop import fit
from jebm.train.runtime import member_runtime, prepare_process, process_runtime

ROOT = Path(__file__).parents[2]

GRAPHS = 3
"""All losses without samples of the prior, and with them; the energy's own loss."""


class Branching(Energy):
    """An energy whose forward depends on values: no one graph."""

    def __init__(self, layers: tuple[tuple[int, ...], ...]) -> None:
        super().__init__(layers)
        self.slope = torch.nn.Parameter(torch.ones(sum(self.widths)))

    def forward(self, z_BS: Tensor) -> Tensor:
        f_B = torch.tanh(z_BS @ self.slope)
        return f_B if f_B.sum() > 0 else 2 * f_B


def train(rank: int, folder: Path, compiled: bool) -> None:
    """Train on one of two ranks; the energy joins in the middle, and shares are unequal."""
    config = tiny_config(
        folder / str(compiled),
        cluster__workers=2,
        train__batch_size=63,
        train__gaussian_share=0.5,
        train__energy_updates=2,
        train__compile=compiled,
        train__report_every_steps=1,
        hierarchy__rate_factor=5.0,
    )
    prepare_process(config, torch.device("cpu"))
    place = {"rank": rank, "world_size": 2}
    with ExitStack() as stack:
        meeting = f"file://{folder}/meeting-{compiled}"
        stack.enter_context(process_group("gloo", init_method=meeting, **place))
        runtime = stack.enter_context(member_runtime(**place, device=torch.device("cpu")))
        assert fit(config, runtime, provenance={}).status == "finished"
    # All were compiled before the first step, and nothing again.
    assert counters["stats"]["unique_graphs"] == (GRAPHS if compiled else 0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what its compiler imports
def test_two_ranks_train_as_they_do_without(tmp_path: Path) -> None:
    rows = {}
    for compiled in (False, True):
        assert exit_code(train, 2, tmp_path, compiled) == 0
        lines = (tmp_path / str(compiled) / "smoke/metrics.jsonl").read_text().splitlines()
        rows[compiled] = [json.loads(line) for line in lines]
    assert len(rows[False]) == len(rows[True]) > 15
    names = ("loss", "distortion", "rate/1", "gap", "gradient_norm/generator", "gradient_norm/energy")
    for row in (*rows[False], *rows[True]):
        # The constant in f is free: the gradient of its bias is rounding, which Adam makes a step of.
        row["gap"] = row["f_posterior"] - row["f_prior"]
    near = {"rel": 1e-3, "abs": 1e-5}
    for one, other in zip(rows[False], rows[True], strict=True):
        for name in names:
            assert other.get(name, 0) == pytest.approx(one.get(name, 0), **near), (one["step"], name)
    assert rows[True][-1]["gradient_norm/energy"] > 0


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_stop_while_compiling_ends_the_run_before_the_next_graph(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train__compile=True, train__energy_updates=2)
    reports: list[int] = []
    with process_runtime(config) as runtime:
        result = fit(
            config,
            runtime,
            provenance={},
            should_stop=lambda: True,
            on_report=lambda report: reports.append(report.step) or False,
        )
    assert (result.status, result.step, reports) == ("stopped", 0, [])
    assert counters["stats"]["unique_graphs"] == 1


def test_what_torch_cannot_compile_is_named_with_its_line(tmp_path: Path) -> None:
    line = Branching.forward.__code__.co_firstlineno + 2
    config = tiny_config(tmp_path, train__compile=True)
    config = replace(config, energy=config_of.Energy(class_path=f"{__name__}.Branching"))
    with process_runtime(config) as runtime, pytest.raises(ConfigError) as raised:
        fit(config, runtime, provenance={})
    assert str(raised.value).startswith("train.compile: torch cannot compile the losses: ")
    assert f'{Path(__file__).name}", line {line}, in forward)' in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.long
def test_without_a_compiler_it_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "jebm", "train", "--config", str(ROOT / "jobs/configs/smoke.yaml")]
    command += ["--cluster.engine", "process", "--cluster.workers", "1", "--train.compile", "true"]
    command += ["--run.storage", str(tmp_path / "runs")]
    ended = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: train.compile: torch cannot compile the losses: ")
    assert last.endswith("; set it to false")
    assert "Traceback" not in ended.stderr
