"""The quick look: the measures that it promises, the same at each look and on any number of workers."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick_worker import CONFIG as SHARED
from quick_worker import look_at
from torch.nn.modules.module import register_module_forward_pre_hook

from jebm.config import Config, Data, Energy, Generator, Inference, Langevin
from jebm.core.model import build_model
from jebm.core.precision import set_tf32, tf32
from jebm.evaluate.features.classifier import ClassifierFeatures
from jebm.evaluate.quick import NAMES, quick_look
from jebm.report.catalogue import MEASURES
from jebm.train.runtime import Runtime

ALONE = Runtime(0, 1, torch.device("cpu"))
HERE = Path(__file__).parent
FASHION = Path(__file__).resolve().parents[2] / "jobs/data/fashion_mnist_2000"
CONFIG = Config(
    data=Data(str(FASHION / "train"), str(FASHION / "test")),
    inference=Inference((2, 4), 8),
    generator=Generator((2, 4), 8),
    energy=Energy(8),
    langevin=Langevin(4, 0.4),
)


def test_no_look_is_taken_unless_one_is_asked_for() -> None:
    assert quick_look(CONFIG) is None


def test_a_look_has_the_measures_it_promises_and_its_noise_stays_the_same(
    fashion_classifier: ClassifierFeatures, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEBM_CACHE", str(cache))
    evaluation = replace(CONFIG.evaluation, every_steps=1, samples=100, chain_factor=3)
    look = quick_look(replace(CONFIG, evaluation=evaluation))
    assert look is not None
    model = build_model(CONFIG).eval()
    seen = set()
    hook = register_module_forward_pre_hook(lambda *_: seen.add(any(tf32().values())))
    set_tf32(convolutions=True, linear=True)
    try:
        found = look(model, 1, ALONE)
        assert tf32() == {"convolutions": True, "linear": True}
    finally:
        hook.remove()
        set_tf32(convolutions=False, linear=False)
    assert seen == {False}, "evaluation is in true float32 whatever training computes in"
    assert tuple(found) == NAMES
    assert set(NAMES) <= set(MEASURES)
    assert all(map(math.isfinite, found.values()))
    assert look(model, 2, ALONE) == found
    assert found["frechet_floor"] < found["frechet_reconstructions"]


def test_workers_share_a_look_and_wait_for_one_another_longer_than_gradients_may(
    fashion_classifier: ClassifierFeatures, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is late by more than the timeout of the group; the others have no classifier in their cache."""
    monkeypatch.setenv("JEBM_CACHE", str(cache))
    command = [sys.executable, str(HERE / "quick_worker.py"), str(tmp_path)]
    path = f"{HERE.parents[1] / 'platform'}:{HERE.parent}"
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=300)
    alone, decoded = look_at(build_model(SHARED).eval(), ALONE)
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told == {"found": alone, "decoded": decoded // 2, "loops": 0}
    assert not (tmp_path / "cache" / "classifiers").exists()  # rank 1 trained none: it got rank 0's
