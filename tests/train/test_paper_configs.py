"""The paper's two configs of SVHN at full size: three real updates on images of SVHN's shape."""

import math
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from jebm.parser import load_config
from jebm.rng import gaussian_noise
from jebm.train.metrics import Clock, Meter
from jebm.train.runtime import Runtime
from jebm.train.state import Horizon, TrainState
from jebm.train.update import JointUpdate


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("svhn_hierarchical", {"generator": 392_288, "inference": 752_160, "energy": 8_551}),
        pytest.param(
            "svhn_fid",
            {"generator": 55_348_608, "inference": 18_999_396, "energy": 15_301},
            marks=pytest.mark.long,
        ),
    ],
)
def test_three_updates_at_full_size(name: str, counts: dict[str, int], tmp_path: Path) -> None:
    config = load_config(ROOT / f"jobs/configs/{name}.yaml")
    assert config.train.batch_size == 100
    runtime = Runtime(0, 1, torch.device("cpu"))
    state = TrainState.build(config, runtime)
    nets = dict(state.model.named_children())
    assert {net: sum(p.numel() for p in nets[net].parameters()) for net in counts} == counts
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    images = torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clock = Clock(runtime.device)
    update = JointUpdate(state, config, runtime, gaussian_noise(0, 0), Horizon(10, 1000), clock)
    losses = []
    for _ in range(3):
        meter = Meter()
        meter.add(update(images).metrics)
        losses.append(meter.take(runtime)["loss"])
    assert state.step == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[2] < losses[0]  # the same images three times
    still = [key for key, value in state.model.named_parameters() if torch.equal(value, before[key])]
    assert still == [f"energy.linears.{config.energy.depth}.bias"]  # a constant added to f changes nothing
