"""A line plot as inline SVG: no script, no style of its own, a few kilobytes.

Colours and dashes come from the page's style sheet: class `line-0` to `line-5`, and `dashed` from the seventh
line on.
"""

import html
import math
from collections.abc import Iterator, Sequence

from jebm.evaluate.findings import Curve

__all__ = ["COLOURS", "line_plot", "number"]

COLOURS = 6
"""Lines that differ by colour alone."""

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 14, 12, 46
_LARGEST = 1e300
_MOST_MARKED = 40
"""Points of a line that are marked one by one, with their numbers as tooltips."""


def number(value: float) -> str:
    """Return a number with four digits, or those before the point and one more: 1.2e-05, 31.27, 1,498.7."""
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < 1000 or abs(value) >= 1e12 or not math.isfinite(value):
        return f"{value:.4g}"
    return f"{value:,.1f}".removesuffix(".0")


def line_plot(curve: Curve) -> str:
    """Return the lines with axes and a legend, as HTML. Values that are not finite leave gaps."""
    points = {
        name: [
            (x, y) if math.isfinite(x) and math.isfinite(y) else None
            for x, y in zip(curve.x, line, strict=False)
        ]
        for name, line in curve.lines.items()
    }
    seen = [point for line in points.values() for point in line if point is not None]
    if not seen:
        return '<p class="none">No line has a finite value.</p>'
    if not all(abs(value) < _LARGEST for point in seen for value in point):
        return '<p class="none">The values are too large to be drawn.</p>'
    across = _Axis([x for x, _ in seen], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([y for _, y in seen], _HEIGHT - _BOTTOM, _TOP)
    alt = html.escape(f"{curve.title}: {', '.join(curve.lines)} over {curve.x_name}. {curve.meaning}")
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{alt}">',
        *_axes(across, up, curve.x_name, curve.y_name),
    ]
    for index, (name, line) in enumerate(points.items()):
        parts += _line(name, line, across, up, _class(index))
    legend = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><path class="{_class(index)}" d="M1 5H25"/>'
        f"</svg> {html.escape(name)}</li>"
        for index, name in enumerate(curve.lines)
    )
    shown = f'<ul class="legend">{legend}</ul>' if len(curve.lines) > 1 else ""
    return f'{shown}<div class="scroll">{"".join(parts)}</svg></div>'


class _Axis:
    """From values to places, with ticks at round numbers."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-290):  # all the same, but for rounding
            margin = 0.1 * abs(high) or 1.0
            low, high = low - margin, high + margin
        self._step = _round_step((high - low) / 5)
        self._first = math.floor(low / self._step + 1e-9)
        self._last = math.ceil(high / self._step - 1e-9)
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        share = (value / self._step - self._first) / (self._last - self._first)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Yield the place of each tick, and its label."""
        decimals = max(0, -math.floor(math.log10(self._step) + 1e-9))
        for index in range(self._first, self._last + 1):
            value = index * self._step
            plain = decimals <= 5 and abs(value) < 1e7
            yield self.place(value), f"{value:,.{decimals}f}" if plain else f"{value:.4g}"


def _round_step(step: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= step)


def _axes(across: _Axis, up: _Axis, x_name: str, y_name: str) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for y, label in up.ticks():
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for x, label in across.ticks():
        yield f'<path class="grid" d="M{x:.1f} {bottom}v5"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{label}</text>'
    yield f'<text class="axis" x="{(_LEFT + right) / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">'
    yield f"{html.escape(x_name)}</text>"
    middle = (_TOP + bottom) / 2
    yield f'<text class="axis" transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">'
    yield f"{html.escape(y_name)}</text>"


def _line(
    name: str, line: Sequence[tuple[float, float] | None], across: _Axis, up: _Axis, kind: str
) -> Iterator[str]:
    path, pen = [], "M"
    for point in line:
        if point is None:
            pen = "M"
            continue
        path.append(f"{pen}{across.place(point[0]):.1f} {up.place(point[1]):.1f}")
        pen = "L"
    yield f'<path class="{kind}" d="{"".join(path)}"/>'
    if len(line) <= _MOST_MARKED:
        for x, y in filter(None, line):
            tip = f"{html.escape(name)}: {number(y)} at {number(x)}"
            yield f'<circle class="{kind}" cx="{across.place(x):.1f}" cy="{up.place(y):.1f}" r="3">'
            yield f"<title>{tip}</title></circle>"


def _class(index: int) -> str:
    return f"line-{index % COLOURS}" + (" dashed" if index >= COLOURS else "")
