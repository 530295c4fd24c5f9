"""The quick look: the measures that it promises, the same at each look."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from jebm.config import Config, Data, Energy, Generator, Inference, Langevin
from jebm.core.model import build_model
from jebm.evaluate.features.classifier import ClassifierFeatures
from jebm.evaluate.quick import NAMES, quick_look
from jebm.report.catalogue import MEASURES

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
    found = look(model, 1)
    assert tuple(found) == NAMES
    assert set(NAMES) <= set(MEASURES)
    assert all(map(math.isfinite, found.values()))
    assert look(model, 2) == found
    assert found["frechet_floor"] < found["frechet_reconstructions"]
