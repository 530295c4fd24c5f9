"""Helpers that the benchmarks share to plot a cost as an SVG file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jebm.report.findings import Curve
from jebm.report.plots import curve_svg

__all__ = ["MILLISECONDS", "draw"]

MILLISECONDS = {"wall": "milliseconds, wall time", "cpu": "milliseconds, CPU time"}
"""The name of a time axis, by clock."""


def draw(
    file: Path, title: str, x_name: str, y_name: str, x: Sequence[float], lines: Mapping[str, Sequence[float]]
) -> None:
    """Write the lines over `x` on logarithmic axes to `file`; creates its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    curve = Curve(title, x_name, y_name, tuple(x), {name: tuple(line) for name, line in lines.items()}, "")
    file.write_bytes(curve_svg(curve, logarithmic=True) or b"")
    print(f"wrote {file}", flush=True)
