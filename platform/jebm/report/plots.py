"""Plots as SVG by matplotlib, without pyplot's global state; the same values give the same bytes.

They are images for an `<img>`: no script, nothing loaded, text as text.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from jebm.report.findings import Curve
from jebm.untrusted import escaped

__all__ = ["COLOURS", "curve_svg", "svg_of", "text_of"]

COLOURS = ("#0072b2", "#d1440c", "#00876a", "#a83f86", "#b07300", "#5a6470")
"""Line colours, distinct for colour-blind readers; from the seventh line on, lines are dashed."""

_STYLE: Any = {
    "axes.edgecolor": "#9aa5b1",
    "axes.grid": True,
    "axes.labelcolor": "#1c2024",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": ["sans-serif"],
    "font.size": 10,
    "grid.color": "#e3e7ec",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "svg.hashsalt": "jebm",  # else identifiers are random
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "xtick.color": "#5a6470",
    "ytick.color": "#5a6470",
}
_LARGEST = 1e300
_MOST_MARKED = 40
"""The most points of a line that get markers."""


def text_of(value: object) -> str:
    """Return text that a plot can show, whatever the value contains."""
    return escaped(str(value))


def svg_of(draw: Callable[[Canvas], object], *, width: float = 7.6, height: float = 3.4) -> bytes:
    """Return what `draw` puts on an empty canvas, sized in inches, as an SVG file."""
    with _style():
        canvas = Canvas(figsize=(width, height))
        draw(canvas)
        file = io.BytesIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def curve_svg(curve: Curve, *, logarithmic: bool = False) -> bytes | None:
    """Return a curve as SVG, with gaps at values that are not finite; None if nothing can be drawn.

    Raises:
        ValueError: a value has no place on a logarithmic axis.
    """
    values = [*curve.x, *(y for line in curve.lines.values() for y in line)]
    if logarithmic and not all(0 < value < _LARGEST for value in values):
        raise ValueError(f"{curve.title}: a value that is not positive has no place on a logarithmic axis")
    # Values that are not finite become gaps; a line with no other values is left out.
    drawable = {name: [_drawable(y) for y in line] for name, line in curve.lines.items()}
    lines = {name: line for name, line in drawable.items() if not all(map(math.isnan, line))}
    if not lines:
        return None

    def draw(canvas: Canvas) -> None:
        axes: Axes = canvas.subplots()
        for index, (name, line) in enumerate(lines.items()):
            axes.plot(
                curve.x[: len(line)],
                line[: len(curve.x)],
                color=COLOURS[index % len(COLOURS)],
                linestyle="-" if index < len(COLOURS) else "--",
                marker="o" if len(line) <= _MOST_MARKED else "",
                markersize=3.5,
                linewidth=1.6,
                label=text_of(name),
            )
        if logarithmic:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_xlabel(text_of(curve.x_name))
        axes.set_ylabel(text_of(curve.y_name))
        if len(lines) > 1:
            canvas.legend(loc="outside upper left", ncols=min(4, len(lines)), fontsize=9)

    return svg_of(draw)


def _drawable(value: float) -> float:
    return value if abs(value) < _LARGEST else math.nan


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the reader's fonts draw the text, not ours
        yield
