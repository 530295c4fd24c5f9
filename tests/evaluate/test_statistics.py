"""Intervals and paired tests, against scipy."""

import math
import random

import pytest
from scipy import stats

from jebm.evaluate.statistics import paired_ratio, paired_t_test


@pytest.mark.parametrize("pairs", [2, 3, 5, 10, 31])
@pytest.mark.parametrize("shift", [0.0, -0.4, 3.0])
def test_the_paired_t_test_is_scipys(pairs, shift):
    draw = random.Random(pairs)
    second = [draw.gauss(50, 10) for _ in range(pairs)]
    first = [value + shift + draw.gauss(0, 1) for value in second]
    found, expected = paired_t_test(first, second), stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.95)
    mean, half_width = found.difference
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (mean - half_width, mean + half_width) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.pairs == pairs
    # The interval excludes zero just where the test rejects at 5 %.
    assert (found.surely_above or found.surely_below) == (expected.pvalue < 0.05)


def test_one_pair_and_equal_pairs_decide_nothing():
    one = paired_t_test([3.0], [1.0])
    assert one.difference == (2.0, math.inf)
    assert math.isnan(one.p_value)
    assert not one.surely_above
    equal = paired_t_test([3.0, 4.0], [3.0, 4.0])
    assert equal.difference == (0.0, 0.0)
    assert math.isnan(equal.p_value)
    assert not equal.surely_above
    assert not equal.surely_below
    assert paired_t_test([2.0, 3.0], [1.0, 2.0]).p_value == 0


def test_the_ratio_is_that_of_the_logarithms():
    first, second = [20.0, 14.0, 16.0], [44.0, 40.0, 50.0]
    logs = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    low, high = stats.t.interval(0.95, 2, sum(logs) / 3, stats.sem(logs))
    expected = (stats.gmean(first) / stats.gmean(second), math.exp(low), math.exp(high))
    assert paired_ratio(first, second) == pytest.approx(expected)
    # Of the ratio the other way round it is the reciprocal.
    assert paired_ratio(second, first) == pytest.approx(tuple(1 / x for x in (expected[0], *expected[:0:-1])))
