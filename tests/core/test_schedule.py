"""Lower layers join late: weights of their rates over a run."""

import pytest

from jebm.config import Hierarchy
from jebm.core.schedule import rate_weights


def test_without_a_factor_or_with_one_layer_there_are_no_weights():
    assert rate_weights(Hierarchy(1.0), 3, 0.0) is None
    assert rate_weights(Hierarchy(30.0), 1, 0.0) is None


def test_at_first_all_but_the_top_are_held_and_from_the_end_on_none():
    assert rate_weights(Hierarchy(30.0), 4, 0.0) == [30, 30, 30, 1]
    assert rate_weights(Hierarchy(30.0, 0.1, 0.4), 4, 0.1) == [30, 30, 30, 1]
    assert rate_weights(Hierarchy(30.0, 0.1, 0.4), 4, 0.4) is None


def test_three_layers_join_in_the_windows_of_the_first_experiment():
    """The middle layer between .15 and .30 of the run, the bottom one between .325 and .475."""
    weights = [rate_weights(Hierarchy(30.0), 3, p) for p in (0.15, 0.225, 0.30, 0.325, 0.40, 0.475)]
    assert weights[0] == [30, 30, 1]
    assert weights[1] == pytest.approx([30, 30**0.5, 1])
    assert weights[2] == pytest.approx([30, 1, 1])
    assert weights[3] == pytest.approx([30, 1, 1])
    assert weights[4] == pytest.approx([30**0.5, 1, 1])
    assert weights[5] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_layers_join_one_after_the_other_from_the_top(layers):
    begun = [False] * (layers - 1)
    for step in range(1001):
        weights = rate_weights(Hierarchy(30.0), layers, step / 1000) or [1.0] * layers
        assert weights[-1] == 1
        assert all(1 <= weight <= 30 for weight in weights)
        between = [1.0001 < weight < 29.99 for weight in weights[:-1]]
        assert sum(between) <= 1
        for layer, joins in enumerate(between):
            begun[layer] |= joins
            if joins:
                assert all(weight == pytest.approx(1) for weight in weights[layer + 1 :])
    assert all(begun)
