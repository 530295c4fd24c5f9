"""The axes of a sweep's plots, and where values lie on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis as Side
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from jebm.report.findings import number
from jebm.report.plots import text_of
from jebm.sweep.dimensions import Value, ordered_choices, position, setting
from jebm.sweep.results import Sweep, Trial
from jebm.sweep.space import Objective

__all__ = ["KeyAxis", "ResultAxis", "ValueAxis"]


@dataclass(frozen=True)
class ValueAxis:
    """An axis for values of an objective.

    It ends where the bad values thin out, so that one trial near divergence does not flatten the others: at
    three times the distance from the best to the 75 % quantile. Logarithmic if the largest value is more than
    `log_over` times the smallest.
    """

    name: str
    low: float
    high: float
    log: bool
    beyond: int
    """Number of values beyond the axis."""

    @classmethod
    def of(cls, objective: Objective, values: Sequence[float], *, log_over: float = 20) -> "ValueAxis":
        """Return the axis for these values."""
        if not values:
            return cls(objective.metric, 0.0, 1.0, log=False, beyond=0)
        sign = objective.sign
        bad = np.sort(sign * np.asarray(values, dtype=float))
        fence = bad[0] + 3 * (np.quantile(bad, 0.75) - bad[0])
        kept = sign * bad[bad <= fence]
        low, high = float(kept.min()), float(kept.max())
        log = low > 0 and high / low > log_over
        if log:
            margin = 0.06 * (math.log10(high) - math.log10(low))
            low, high = low / 10**margin, high * 10**margin
        else:
            margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            low, high = low - margin, high + margin
        return cls(objective.metric, low, high, log, len(values) - len(kept))

    @property
    def note(self) -> str:
        """A sentence on values beyond the axis; empty if there are none."""
        lie = "value lies" if self.beyond == 1 else "values lie"
        return f" {self.beyond} {lie} beyond the axis." if self.beyond else ""

    def scaled(self, value: float) -> float:
        """Return where a value lies between the ends, 0 to 1, clipped to them."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return (at - low) / (high - low)

    def at(self, share: float) -> float:
        """Return the value at a share of the axis: the inverse of `scaled`."""
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + share * (self.high - self.low)

    def lay_out(self, axes: Axes, side: str, *, title: bool = True) -> None:
        """Give one side of a plot this axis; `side` is x or y."""
        getattr(axes, f"set_{side}scale")("log" if self.log else "linear")
        getattr(axes, f"set_{side}lim")(self.low, self.high)
        if self.log:
            _mark_powers(getattr(axes, f"{side}axis"), self.low, self.high)
        if title:
            getattr(axes, f"set_{side}label")(text_of(self.name))


@dataclass(frozen=True)
class ResultAxis:
    """The first objective's axis, with a row along its bad end for stopped trials.

    They have no result comparable with the others'.
    """

    values: ValueAxis
    row: float
    note: str

    @classmethod
    def of(cls, sweep: Sweep) -> "ResultAxis":
        """Return the axis for a sweep's trials that have ended."""
        objective = sweep.objectives[0]
        axis = ValueAxis.of(objective, [trial.values[0] for trial in sweep.having("finished")])
        falling = objective.sign > 0
        row = axis.at(1.06 if falling else -0.06)
        note = axis.note
        if sweep.having("pruned", "diverged"):
            low, high = (axis.low, axis.at(1.12)) if falling else (axis.at(-0.12), axis.high)
            axis = ValueAxis(axis.name, low, high, axis.log, axis.beyond)
            edge = "top" if falling else "bottom"
            note = f" Stopped trials, which have no final value, stand in a row at the {edge}.{note}"
        return cls(axis, row, note)

    def level(self, trial: Trial) -> float:
        """Return a trial's place on the axis."""
        return trial.values[0] if trial.values else self.row


@dataclass(frozen=True)
class KeyAxis:
    """An axis for the values of a searched key, over the whole searched range."""

    key: str
    distribution: BaseDistribution
    choices: list[Value]
    """Sorted if they have an order; empty for a range."""
    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, sweep: Sweep, key: str) -> "KeyAxis":
        """Return a key's axis; for choices, it extends half a place beyond the outer ones."""
        axis = sweep.space[key]
        if isinstance(axis, FloatDistribution | IntDistribution):
            return cls(key, axis, [], float(axis.low), float(axis.high), axis.log)
        found = list(axis.choices) if isinstance(axis, CategoricalDistribution) else []
        choices = list(ordered_choices(axis)) or found
        return cls(key, axis, choices, -0.5, len(choices) - 0.5, log=False)

    def coordinate(self, value: Value) -> float:
        """Return where a value lies on the axis: itself, or the index of a choice."""
        return float(self.choices.index(value)) if self.choices else float(value)

    def scaled(self, value: Value) -> float:
        """Return where a value lies between the ends, 0 to 1, on the scale of the search."""
        if self.choices:
            return self.choices.index(value) / max(1, len(self.choices) - 1)
        place = position(self.distribution, value)
        return 0.5 if place is None else place

    def grid(self, count: int) -> list[Value]:
        """Return values from end to end, evenly spaced on the search's scale; for choices, all of them."""
        space = np.geomspace if self.log else np.linspace
        return self.choices or list(space(self.low, self.high, count).tolist())

    def marks(self) -> list[tuple[float, str]]:
        """Return (share of the axis, label) for a few values."""
        if self.choices:
            return [(self.scaled(choice), setting(choice)) for choice in self.choices]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [(0.0, number(self.low)), (0.5, f"{middle:.2g}"), (1.0, number(self.high))]

    def lay_out(self, axes: Axes, side: str) -> None:
        """Give one side of a plot this axis; `side` is x or y."""
        getattr(axes, f"set_{side}label")(text_of(self.key))
        ticks: Side = getattr(axes, f"{side}axis")
        limit = getattr(axes, f"set_{side}lim")
        if self.choices:
            limit(self.low, self.high)
            ticks.set_ticks(range(len(self.choices)), [text_of(setting(choice)) for choice in self.choices])
        elif self.log:
            getattr(axes, f"set_{side}scale")("log")
            margin = (self.high / self.low) ** 0.04
            limit(self.low / margin, self.high * margin)
            _mark_powers(ticks, self.low, self.high)
        else:
            margin = 0.04 * (self.high - self.low) or 1.0
            limit(self.low - margin, self.high + margin)


def _mark_powers(side: Side, low: float, high: float) -> None:
    """Mark a logarithmic axis at decades, or also at 2 and 5 if there are few decades."""
    low, high = math.log10(low), math.log10(high)
    digits = (1,) if high - low > 2.2 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
    side.set_major_locator(FixedLocator([tick for tick in ticks if low <= math.log10(tick) <= high]))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
