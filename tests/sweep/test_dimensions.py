"""One searched key: where values lie in their range, and how range and values are written."""

import random

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from jebm.errors import ConfigError
from jebm.sweep.dimensions import (
    contains,
    dimension,
    grid_points,
    label,
    listed,
    ordered_choices,
    position,
    searched,
    setting,
)


def test_places_in_a_range_follow_its_scale():
    assert position(FloatDistribution(1e-4, 1.0, log=True), 1e-2) == pytest.approx(0.5)
    assert position(IntDistribution(10, 30), 15) == pytest.approx(0.25)
    assert position(CategoricalDistribution([40, 10, 20]), 20) == pytest.approx(0.5)
    assert position(CategoricalDistribution(["a", "b"]), "a") is None
    assert position(CategoricalDistribution([True, False]), True) is None


RANGES = [
    FloatDistribution(0.5, 2.0),
    FloatDistribution(1e-6, 1.0, log=True),
    IntDistribution(-5, 20),
    IntDistribution(1, 1000, log=True),
]


@pytest.mark.parametrize("axis", RANGES, ids=str)
def test_places_go_from_end_to_end_in_order(axis):
    assert (position(axis, axis.low), position(axis, axis.high)) == pytest.approx((0, 1))
    generator = random.Random(0)
    values = sorted(generator.uniform(axis.low, axis.high) for _ in range(50))
    places = [position(axis, value) for value in values]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)


def test_equal_factors_are_equal_steps_on_a_log_scale():
    axis = FloatDistribution(1e-4, 1.0, log=True)
    places = [position(axis, 10.0**power) for power in (-4, -3, -2, -1, 0)]
    assert places == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_a_range_of_one_value_has_no_places():
    assert position(IntDistribution(3, 3), 3) is None
    assert position(CategoricalDistribution([3]), 3) is None
    assert position(CategoricalDistribution([1, 2]), 3) is None  # none of the choices


@pytest.mark.parametrize(
    ("choices", "ordered"),
    [
        ([40, 10, 20], [10, 20, 40]),
        ([0.5, 0.1], [0.1, 0.5]),
        (["a", "b"], []),
        ([True, False], []),
        ([1, None], []),
    ],
)
def test_only_numbers_have_an_order(choices, ordered):
    assert ordered_choices(CategoricalDistribution(choices)) == ordered
    assert ordered_choices(IntDistribution(1, 3)) == []  # no choices


@pytest.mark.parametrize(
    ("axis", "inside", "outside"),
    [
        (FloatDistribution(0.1, 1.0), 0.1, 1.1),
        (IntDistribution(1, 9), 9, 10),
        (FloatDistribution(1e-3, 1.0, log=True), 0.5, 2.0),
    ],
)
def test_a_range_contains_its_ends_and_nothing_beyond(axis, inside, outside):
    assert contains(axis, inside)
    assert not contains(axis, outside)


def test_what_is_no_choice_is_an_error():
    axis = CategoricalDistribution([10, "[2, 2]"])
    assert contains(axis, 10)
    assert contains(axis, label([2, 2]))
    with pytest.raises(ValueError, match="11"):
        contains(axis, 11)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (["uniform", 0.1, 1], "0.1 to 1"),
        (["loguniform", 1e-5, 0.01], "1e-05 to 0.01, log scale"),
        (["int", 10, 200], "10 to 200"),
        (["logint", 1, 64], "1 to 64, log scale"),
        (["choice", [20, None, "relu", True, [2, 2, 10]]], "20 | null | relu | true | [2, 2, 10]"),
    ],
)
def test_an_entry_becomes_a_distribution_that_says_what_is_searched(entry, text):
    axis, probes = dimension("energy.width", entry, grid=False)
    assert searched(axis) == text
    assert all(contains(axis, probe) for probe in probes)


def test_the_probes_of_a_range_are_its_ends_and_what_lies_between():
    _, probes = dimension("langevin.step_size", ["uniform", 0, 10], grid=False)
    low, inside, high = probes
    assert (low, high) == (0, 10)
    assert 0 < inside < 10
    assert inside != round(inside)  # so that a key which needs whole numbers shows itself
    assert dimension("energy.width", ["int", 1, 9], grid=False)[1] == [1, 9]


@pytest.mark.parametrize("entry", [["uniform", 0, 1], ["loguniform", 0.1, 1], ["logint", 1, 9]])
def test_a_grid_needs_values_that_can_be_listed(entry):
    dimension("energy.width", entry, grid=False)
    with pytest.raises(ConfigError, match=r"^space: energy\.width: a grid needs choice or int"):
        dimension("energy.width", entry, grid=True)


def test_a_grid_has_the_product_of_its_keys_the_last_one_moving_fastest():
    space = {
        "a": CategoricalDistribution(["x", "y"]),
        "b": IntDistribution(1, 3),
        "c": CategoricalDistribution([0]),
    }
    points = grid_points(space)
    assert [tuple(point.values()) for point in points] == [(a, b, 0) for a in "xy" for b in (1, 2, 3)]
    assert all(list(point) == ["a", "b", "c"] for point in points)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0001, "0.0001"), (3, "3"), (True, "true"), (None, "null"), ("relu", "relu"), ([2, 10], "[2, 10]")],
)
def test_values_are_written_as_in_a_config(value, text):
    assert setting(value) == text


def test_words_make_a_list():
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
