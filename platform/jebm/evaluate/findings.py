"""What an evaluation has found, ready to be shown: figures with what they mean, tables, curves, pictures.

Everything is plain values, so that findings travel as JSON between workers, and from one evaluation to a
comparison of many. Pictures alone are bytes beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Curve", "Figure", "Findings", "Picture", "Section", "Table"]


@dataclass(frozen=True)
class Figure:
    """One number."""

    name: str
    value: float | None
    """None where it does not exist, e.g. the distance of samples that are not finite."""
    error: float | None
    """Standard error, where it is known."""
    unit: str
    """nats, bits/dim, share, images …; empty for a number without one."""
    better: Literal["lower", "higher"] | None
    """None where neither is."""
    meaning: str
    """One line for a reader who has not met it."""


@dataclass(frozen=True)
class Table:
    """A small table; None is a cell without a value."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
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
class Picture:
    """A grid of images."""

    title: str
    file: str
    """Name of the PNG beside the report: hierarchy-z3.png."""
    png: bytes
    meaning: str


@dataclass(frozen=True)
class Section:
    """What one measure has found."""

    name: str
    """Name in `--suite`: likelihood, samples, hierarchy, ood, chains."""
    title: str
    meaning: str
    seconds: float
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    pictures: tuple[Picture, ...] = ()
    warnings: tuple[str, ...] = ()
    """Where a figure must not be trusted, and why."""


@dataclass(frozen=True)
class Findings:
    """One evaluation of one checkpoint."""

    provenance: Mapping[str, str]
    """Checkpoint, step, seed, data with their sha256, feature net, git revision, versions, device, time."""
    config: Mapping[str, object]
    """Of the run, nested plain values."""
    sections: tuple[Section, ...] = field(default=())
