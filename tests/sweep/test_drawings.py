"""Where values lie on the axes of a sweep's plots, and what a map makes of them."""

import math
import random

import numpy as np
import pytest
from made_sweeps import center, draw, ended, sweep_of

from jebm.sweep.axes import KeyAxis, ResultAxis, ValueAxis
from jebm.sweep.drawings import best_so_far
from jebm.sweep.key_drawings import smooth
from jebm.sweep.space import Objective

LOSS = Objective("loss", "minimize")


@pytest.mark.parametrize("values", [(1.0, 2.0, 4.0), (0.01, 0.5, 1.0), (-3.0, 0.0, 3.0), (5.0,)])
def test_an_axis_goes_both_ways(values):
    for direction in ("minimize", "maximize"):
        axis = ValueAxis.of(Objective("m", direction), values)
        assert [axis.at(axis.scaled(value)) for value in values] == pytest.approx(values)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_an_axis_holds_all_values_but_far_bad_ones(direction):
    sign = 1 if direction == "minimize" else -1
    values = [sign * value for value in (1.0, 1.5, 2.0, 2.5, 1e6)]
    axis = ValueAxis.of(Objective("loss", direction), values)
    assert all(axis.low < value < axis.high for value in values[:4])
    assert not axis.low < values[4] < axis.high
    assert axis.beyond == 1
    assert axis.note == " 1 value lies beyond the axis."
    assert axis.scaled(values[4]) in (0.0, 1.0)


def test_an_axis_is_logarithmic_where_values_span_decades():
    assert ValueAxis.of(LOSS, [1.0, 15.0]).log is False
    axis = ValueAxis.of(LOSS, [0.1, 0.4, 10.0, 12.0, 14.0])
    assert axis.log
    assert axis.scaled(1.0) - axis.scaled(0.1) == pytest.approx(axis.scaled(10.0) - axis.scaled(1.0))
    assert ValueAxis.of(LOSS, [-1.0, 100.0]).log is False  # no logarithm of what is below zero


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_stopped_trials_stand_in_a_row_at_the_bad_end(direction):
    trials = [ended(0, center(), 1.0), ended(1, center(), 2.0), ended(2, center())]
    axis = ResultAxis.of(sweep_of(trials, objectives=(("loss", direction),)))
    assert axis.level(trials[0]) == 1.0
    row = axis.level(trials[2])
    assert row > 2.0 if direction == "minimize" else row < 1.0
    assert axis.values.low < row < axis.values.high
    assert ("top" if direction == "minimize" else "bottom") in axis.note
    assert "row" not in ResultAxis.of(sweep_of(trials[:2])).note


def test_a_key_goes_from_end_to_end_of_what_was_searched():
    sweep = sweep_of([])
    size = KeyAxis.of(sweep, "langevin.step_size")
    grid = size.grid(5)
    assert (grid[0], grid[-1]) == pytest.approx((0.05, 1.0))
    assert [size.scaled(value) for value in grid] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert [text for _, text in size.marks()] == ["0.05", "0.22", "1"]
    steps = KeyAxis.of(sweep, "langevin.steps")
    assert steps.grid(32) == steps.choices == [10, 20, 40]
    assert [steps.coordinate(choice) for choice in (10, 20, 40)] == [0, 1, 2]
    dims = KeyAxis.of(sweep, "model.latent_dims")  # in the order of the search
    assert dims.marks() == [(0.0, "[2, 2, 10]"), (1.0, "[4, 4, 8]")]


@pytest.mark.parametrize("count", [5, 50])
def test_a_smoothed_map_stays_within_its_values(count):
    generator = np.random.default_rng(0)
    places, values = generator.random((count, 2)), generator.normal(size=count)
    shares = np.linspace(0, 1, 16)
    surface = smooth(places, values, (shares, shares))
    known = surface[~np.isnan(surface)]
    assert known.size
    assert known.min() >= values.min()
    assert known.max() <= values.max()
    assert np.allclose(smooth(places, np.full(count, 3.0), (shares, shares))[~np.isnan(surface)], 3.0)


def test_a_map_says_nothing_far_from_every_trial():
    surface = smooth(np.zeros((40, 2)), np.zeros(40), (np.array([0.0, 1.0]), np.array([0.0, 1.0])))
    assert not math.isnan(surface[0, 0])
    assert np.isnan(surface[1, 1])


@pytest.mark.parametrize("seed", range(3))
def test_the_best_so_far_only_gets_better(seed):
    generator = random.Random(seed)
    sweep = sweep_of([ended(i, draw(generator), generator.random()) for i in range(30)])
    line = [trial.values[0] for trial in best_so_far(sweep)]
    assert line == sorted(set(line), reverse=True)
    assert line[-1] == min(trial.values[0] for trial in sweep.trials)
    assert best_so_far(sweep)[0].number == 0
