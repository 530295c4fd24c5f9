"""Findings, ready to show: figures with their meanings, tables, curves, pictures.

An evaluation, a sweep or a comparison produces them, and one page shows them. All are plain values, so that
findings can be sent between workers and stored in a report as JSON; only pictures and drawings are bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import yaml

__all__ = [
    "NONE",
    "Cell",
    "Curve",
    "Drawing",
    "Figure",
    "Findings",
    "Listing",
    "Measured",
    "Picture",
    "Section",
    "Table",
    "duration",
    "number",
    "plural",
    "shown",
    "yaml_text",
]

NONE = "–"  # noqa: RUF001 (shown for a missing value)


@dataclass(frozen=True)
class Measured:
    """A value with its error, for a table cell: shown as value ± error, with matching digits."""

    value: float | None
    error: float | None


Cell: TypeAlias = str | float | int | Measured | None


@dataclass(frozen=True)
class Figure:
    """One number."""

    name: str
    value: float | None
    """None if undefined, e.g. the distance of samples that are not finite."""
    error: float | None
    """Standard error, if known."""
    unit: str
    """nats, bits/dim, share, images …; empty for a number without one."""
    better: Literal["lower", "higher"] | None
    """None if neither is better."""
    meaning: str
    """One line for a reader who does not know it."""


@dataclass(frozen=True)
class Table:
    """A small table; None is a cell without a value."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    meaning: str


@dataclass(frozen=True)
class Curve:
    """Lines over a common axis."""

    title: str
    x_name: str
    y_name: str
    x: tuple[float, ...]
    lines: Mapping[str, tuple[float, ...]]
    meaning: str


@dataclass(frozen=True)
class Drawing:
    """A finished plot, as SVG; its numbers are in tables."""

    title: str
    svg: bytes
    meaning: str


@dataclass(frozen=True)
class Picture:
    """A grid of images."""

    title: str
    file: str
    """Name of the PNG next to the report: hierarchy-z3.png."""
    png: bytes
    meaning: str
    cover: bool = False
    """Whether the first screen shows it."""


@dataclass(frozen=True)
class Listing:
    """Text to show verbatim: a command to type, a config."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """The results of one measure or one question."""

    name: str
    """A short name, unique among the sections: likelihood, samples, cost …"""
    title: str
    meaning: str
    seconds: float | None = None
    """How long it took to measure, if known."""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences that interpret the numbers."""
    listings: tuple[Listing, ...] = ()
    warnings: tuple[str, ...] = ()
    """Reasons not to trust a figure."""


@dataclass(frozen=True)
class Findings:
    """The content of one report."""

    title: str
    """The run and what was done with it."""
    lead: tuple[str, ...]
    """Lines below the title: data, model, how long it took."""
    provenance: Mapping[str, str]
    """Checkpoint, step, seed, data with their sha256, git revision, versions, device, time."""
    config: Mapping[str, object]
    """Of the run, nested plain values."""
    sections: tuple[Section, ...] = ()


def number(value: float) -> str:
    """Return a number with four digits, or all before the point and one after: 1.2e-05, 31.27, 1,498.7."""
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < 1000 or abs(value) >= 1e12 or not math.isfinite(value):
        return f"{value:.4g}"
    return f"{value:,.1f}".removesuffix(".0")


def shown(cell: Cell | Figure) -> str:
    """Return a cell or a figure's value as text: a value with an error to two digits of the error."""
    if isinstance(cell, Figure | Measured):
        return _with_error(cell.value, cell.error)
    if cell is None:
        return NONE
    return cell if isinstance(cell, str) else number(cell)


def duration(seconds: float) -> str:
    """Return a time in readable form: 4.2 s, 12 s, 3.5 min, 1.6 h."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.{0 if seconds >= 10 else 1}f} s"


def plural(count: int, noun: str) -> str:
    """Return "1 trial", "2,000 trials"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def yaml_text(values: Mapping[str, object]) -> str:
    """Return nested plain values as YAML for a reader."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return text


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return NONE
    if error is None or not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return number(value) + ("" if error is None else f" ± {number(error)}")
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 6 or abs(value) >= 1e12:  # too long to read
        return f"{value:.6g} ± {error:.2g}"
    value = round(value, decimals) + 0.0  # no minus at zero
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"
