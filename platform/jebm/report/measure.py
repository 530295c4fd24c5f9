"""A measure's description; `jebm.report.catalogue` has them all."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from jebm.report.findings import Figure

__all__ = ["SYMBOLS", "Measure"]

SYMBOLS = {
    "anomalies": "X",
    "chains": "B",
    "distance": "Fréchet distance",
    "draws": "R",
    "images": "N",
    "layer": "zi",
    "long": "L",
    "other_end": "a value that is shown",
    "samples": "M",
    "score": "S",
    "share": "shown",
    "short": "K",
}
"""What an unset field shows: N images, M samples, chains of K steps or, if long, L."""


@dataclass(frozen=True)
class Measure:
    """A number that can be measured of a model."""

    name: str
    """Name in rows; in metrics, evaluation/NAME."""
    title: str
    meaning: str
    """One line for a reader who does not know it."""
    unit: str = ""
    """nats (for one image), bits/dim, share, samples; empty for a number without one."""
    better: Literal["lower", "higher"] | None = None
    digits: int = 2
    """Digits after the point in a comparison."""
    ratio: bool = False
    """Whether the ratio of two models is more informative than their difference."""

    def filled(self, **values: object) -> "Measure":
        """Return the measure with the fields of title and meaning filled in, integers with commas."""
        known = {name: f"{v:,}" if isinstance(v, int) else str(v) for name, v in values.items()}
        fields = SYMBOLS | known
        return replace(self, title=self.title.format(**fields), meaning=self.meaning.format(**fields))

    def figure(self, value: float | tuple[float, float] | None, error: float | None = None) -> Figure:
        """Return a figure for a report; `value` may be a pair with its standard error.

        Values that are not finite become None.
        """
        if isinstance(value, tuple):
            value, error = value
        known = None if value is None or not math.isfinite(value) else float(value)
        if known is None or error is None or not math.isfinite(error):
            error = None
        return Figure(self.title, known, error, self.unit, self.better, self.meaning)
