"""Statistics of a few seeds: means with intervals, and paired tests of one arm against another."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Interval", "PairedTest", "Ratio", "paired_ratio", "paired_t_test", "t_interval"]


class Interval(NamedTuple):
    """A mean and the half width of its confidence interval."""

    mean: float
    half_width: float


class PairedTest(NamedTuple):
    """Whether two arms differ, judged by the differences within pairs."""

    difference: Interval
    """Mean of first minus second, with the half width of its 95 % t-interval."""
    p_value: float
    """Of the two-sided paired t-test; NaN for one pair, and if no pair differs."""
    pairs: int

    @property
    def surely_above(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.difference.mean - self.difference.half_width > 0

    @property
    def surely_below(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.difference.mean + self.difference.half_width < 0


class Ratio(NamedTuple):
    """A ratio and its 95 % interval."""

    value: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with its 95 % interval by Student's t; infinite for one value."""
    if len(values) < 2:
        return Interval(values[0], math.inf)
    quantile = _t_quantile(0.975, len(values) - 1)
    return Interval(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Return the paired t-test of `first` against `second`, whose i-th values form a pair.

    Needs at least one pair; raises ValueError if the lengths differ.
    """
    differences = [one - other for one, other in zip(first, second, strict=True)]
    count = len(differences)
    deviation = statistics.stdev(differences) if count > 1 else math.nan
    mean = statistics.fmean(differences)
    if deviation > 0:
        p_value = 2 * (1 - _t_cdf(abs(mean) / (deviation / math.sqrt(count)), count - 1))
    else:
        p_value = 0.0 if deviation == 0 and mean != 0 else math.nan
    return PairedTest(t_interval(differences), p_value, count)


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return the geometric mean of first / second over pairs of positive values, with its 95 % interval.

    The interval is that of the mean logarithm by Student's t; for one pair, from 0 to infinity.
    """
    mean, half_width = t_interval(
        [math.log(one) - math.log(other) for one, other in zip(first, second, strict=True)]
    )
    return Ratio(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width))


def _t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t, for a probability in [1/2, 1)."""
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < probability else (low, middle)
    return high


def _t_cdf(t: float, freedom: int) -> float:
    """Return P(T <= t) for t >= 0: a finite sum in the angle of t (Abramowitz and Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for m in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (m - 1) / m
    within = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return 0.5 + 0.5 * within
