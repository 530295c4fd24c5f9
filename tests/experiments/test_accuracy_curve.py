"""experiments/accuracy_curve.py: a power law that is known is found, and its intervals hold what they say."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest

fitted = runpy.run_path(str(Path(__file__).resolve().parents[2] / "experiments" / "accuracy_curve.py"))[
    "fitted"
]
BUDGETS = (1201, 1201, 1201, 3003, 8580)


def accuracy(updates: float) -> float:
    return 1 - 0.9 * updates**-0.19


def test_runs_on_a_power_law_give_it_back() -> None:
    law = fitted([(updates, accuracy(updates)) for updates in BUDGETS])
    assert (law.exponent, math.exp(law.intercept)) == pytest.approx((0.19, 0.9))
    assert law.predicted(17160) == pytest.approx([accuracy(17160)] * 3)
    assert law.needed(accuracy(50_000)) == pytest.approx(50_000)


def test_a_further_run_lies_in_its_interval_as_often_as_is_said() -> None:
    random, inside, times = np.random.default_rng(0), 0, 400
    for _ in range(times):
        off = np.exp(random.normal(0, 0.02, len(BUDGETS) + 1))
        points = [(u, 1 - (1 - accuracy(u)) * e) for u, e in zip(BUDGETS, off, strict=False)]
        _, low, high = fitted(points).predicted(17160)
        inside += low < 1 - (1 - accuracy(17160)) * off[-1] < high
    assert inside / times == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / times))
