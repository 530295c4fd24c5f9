"""A searched key: its distribution, its values as text, and where a value lies in the searched range."""

import difflib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from jebm.errors import ConfigError
from jebm.report.findings import number

__all__ = [
    "Value",
    "contains",
    "dimension",
    "finite_number",
    "grid_points",
    "label",
    "listed",
    "one_of",
    "ordered_choices",
    "position",
    "searched",
    "setting",
    "whole_number",
]

Value: TypeAlias = Any
"""The value of a searched key: bool, int, float, str or None. Optuna checks it, so mypy need not."""

_KINDS = ("uniform", "loguniform", "int", "logint", "choice")
_MOST_POINTS = 10_000  # of a grid: each is checked before anything starts


# ── Made from the entry of a search ─────────────────────────────────────────────────────────────────────


def dimension(key: str, entry: object, *, grid: bool) -> tuple[BaseDistribution, list[Any]]:
    """Return the distribution of one entry of a space, and values that must each give a valid config.

    Raises:
        ConfigError: the entry is invalid, or (with `grid`) has no finite list of values.
    """
    where = f"space: {key}"
    if not isinstance(entry, list) or not entry:
        raise ConfigError(f"{where}: must be a list such as [uniform, 0.1, 1.0] or [choice, [1, 2]]")
    kind = one_of(entry[0], _KINDS, where)
    if kind == "choice":
        return _choice(where, entry)
    # Two bounds: numbers in order, above 0 on a log scale.
    if len(entry) != 3:
        raise ConfigError(f"{where}: needs two bounds, [{kind}, low, high]")
    low, high = (finite_number(bound, where) for bound in entry[1:])
    if low >= high:
        raise ConfigError(f"{where}: the low bound {low:g} must lie below the high bound {high:g}")
    if kind.startswith("log") and low <= 0:
        raise ConfigError(f"{where}: {kind} needs a low bound above 0, not {low:g}")
    # Whole numbers, which a grid can list, or a range.
    if kind in ("int", "logint"):
        low, high = (whole_number(bound, where, -(2**53)) for bound in (low, high))
        if grid and kind == "logint":
            raise ConfigError(f"{where}: a grid needs choice or int, not logint")
        return IntDistribution(low, high, log=kind == "logint"), [low, high]
    if grid:
        raise ConfigError(f"{where}: a grid needs choice or int, not {kind}")
    inside = low + (high - low) / math.pi  # not a whole number, so a key that needs one is found
    return FloatDistribution(low, high, log=kind == "loguniform"), [low, inside, high]


def _choice(where: str, entry: list[Any]) -> tuple[BaseDistribution, list[Any]]:
    if len(entry) != 2 or not isinstance(entry[1], list) or not entry[1]:
        raise ConfigError(f"{where}: needs one list of values, [choice, [1, 2]]")
    labels = [label(value) for value in entry[1]]
    for value in labels:
        if not isinstance(value, str | int | float | None):
            raise ConfigError(f"{where}: a choice must be a plain value or a list, not {value!r}")
    if len(set(map(json.dumps, labels))) < len(labels):
        raise ConfigError(f"{where}: a choice stands twice")
    return CategoricalDistribution(labels), labels


def label(value: object) -> Value:
    """Return a choice in a form Optuna accepts: a list as its JSON text."""
    return json.dumps(value) if isinstance(value, list) else value


def grid_points(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Return all points of a space of choices and whole numbers, the last key varying fastest.

    Raises:
        ConfigError: there are too many.
    """
    values: list[Sequence[Value]] = [
        axis.choices if isinstance(axis, CategoricalDistribution) else range(axis.low, axis.high + 1)
        for axis in space.values()
        if isinstance(axis, CategoricalDistribution | IntDistribution)
    ]
    points = math.prod(axis[-1] - axis[0] + 1 if isinstance(axis, range) else len(axis) for axis in values)
    if points > _MOST_POINTS:
        raise ConfigError(
            f"space: a grid of {points:,} points, and {_MOST_POINTS:,} are the most; list fewer values with "
            "choice, or take the sampler random"
        )
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


# ── Checks of a search's values: each raises a ConfigError that names the key ───────────────────────────


def one_of(value: object, allowed: tuple[Any, ...], key: str) -> Any:  # noqa: ANN401  (one of `allowed`)
    """Return the value; raises `ConfigError` unless it is one of `allowed`."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{key}: must be one of {', '.join(allowed)}, not {value}{hint}")
    return value


def finite_number(value: object, key: str) -> float:
    """Return the value; raises `ConfigError` unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key}: needs a number, not {value!r}")
    return value


def whole_number(value: object, key: str, least: int) -> int:
    """Return the value; raises `ConfigError` unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key}: needs a whole number, not {value!r}")
    if value < least:
        raise ConfigError(f"{key}: must be at least {least}, not {value}")
    return value


# ── Values in their range ───────────────────────────────────────────────────────────────────────────────


def contains(distribution: BaseDistribution, value: Value) -> bool:
    """Return whether a value is one of those searched; raises ValueError if it is of another type."""
    return distribution._contains(distribution.to_internal_repr(value))


def ordered_choices(distribution: BaseDistribution) -> list[float]:
    """Return numeric choices from low to high; none for choices without an order."""
    choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else ()
    if not all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices):
        return []
    return sorted(float(choice) for choice in choices if choice is not None and not isinstance(choice, str))


def position(distribution: BaseDistribution, value: Value) -> float | None:
    """Return where a value lies in the searched range, 0 to 1, on the scale of the search.

    Numeric choices count by their order; for other choices, return None.
    """
    if isinstance(distribution, FloatDistribution | IntDistribution):
        low, high, at = float(distribution.low), float(distribution.high), float(value)
        if distribution.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low) if high > low else None
    choices = ordered_choices(distribution)
    return choices.index(value) / (len(choices) - 1) if len(choices) > 1 and value in choices else None


def setting(value: object) -> str:
    """Return a value of the configuration as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return json.dumps(value, default=str)


def searched(distribution: BaseDistribution) -> str:
    """Return a range or the choices as text."""
    if isinstance(distribution, FloatDistribution | IntDistribution):
        log = ", log scale" if distribution.log else ""
        return f"{number(distribution.low)} to {number(distribution.high)}{log}"
    if isinstance(distribution, CategoricalDistribution):
        return " | ".join(setting(choice) for choice in distribution.choices)
    return type(distribution).__name__


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
