"""A line plot as SVG, a few kilobytes without a script: inside a page, or as a file by itself.

Colours and dashes come from `plot.css`, which the page has and the file holds: class `line-0` to `line-5`,
and `dashed` from the seventh line on.
"""

import html
import importlib.resources
import math
from collections.abc import Iterator, Sequence

from jebm.evaluate.findings import Curve

__all__ = ["COLOURS", "line_plot", "number", "svg_file"]

COLOURS = 6
"""Lines that differ by colour alone."""

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 22, 12, 46
_LARGEST = 1e300
_MOST_MARKED = 40
"""Points of a line that are marked one by one, with their numbers as tooltips."""
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_LETTER = 7.5
"""Width that is kept for a letter of the legend in a file, where it cannot be measured."""
_ROW = 20


def number(value: float) -> str:
    """Return a number with four digits, or those before the point and one more: 1.2e-05, 31.27, 1,498.7."""
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < 1000 or abs(value) >= 1e12 or not math.isfinite(value):
        return f"{value:.4g}"
    return f"{value:,.1f}".removesuffix(".0")


def line_plot(curve: Curve) -> str:
    """Return the lines with axes and a legend, as HTML. Values that are not finite leave gaps."""
    points = _points(curve)
    seen = [point for line in points.values() for point in line if point is not None]
    if not seen:
        return '<p class="none">No line has a finite value.</p>'
    if not all(abs(value) < _LARGEST for point in seen for value in point):
        return '<p class="none">The values are too large to be drawn.</p>'
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_alt(curve)}">',
        *_drawing(curve, points, _Axis),
    ]
    legend = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><path class="{_class(index)}" d="M1 5H25"/>'
        f"</svg> {html.escape(name)}</li>"
        for index, name in enumerate(curve.lines)
    )
    shown = f'<ul class="legend">{legend}</ul>' if len(curve.lines) > 1 else ""
    return f'{shown}<div class="scroll">{"".join(parts)}</svg></div>'


def svg_file(curve: Curve) -> str:
    """Return the lines on logarithmic axes, as an SVG file with its own style and the legend in it.

    Raises:
        ValueError: a value is not a positive finite number.
    """
    for value in (*curve.x, *(y for line in curve.lines.values() for y in line)):
        if not 0 < value < _LARGEST:
            raise ValueError(f"{curve.title}: {value} has no place on a logarithmic axis")
    style = importlib.resources.files("jebm.evaluate").joinpath("plot.css").read_text(encoding="utf-8")
    legend, rows = _legend(list(curve.lines))
    height = _HEIGHT + _ROW * rows
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{_alt(curve)}" font-family="{_FONT}">\n',
            f"<style>\n{style}</style>\n",
            f'<rect width="{_WIDTH}" height="{height}" style="fill: var(--page)"/>',
            *legend,
            f'<g transform="translate(0 {_ROW * rows})">',
            *_drawing(curve, _points(curve), _LogarithmicAxis),
            "</g></svg>\n",
        ]
    )


_Points = dict[str, list[tuple[float, float] | None]]


def _points(curve: Curve) -> _Points:
    return {
        name: [
            (x, y) if math.isfinite(x) and math.isfinite(y) else None
            for x, y in zip(curve.x, line, strict=False)
        ]
        for name, line in curve.lines.items()
    }


def _alt(curve: Curve) -> str:
    return html.escape(f"{curve.title}: {', '.join(curve.lines)} over {curve.x_name}. {curve.meaning}")


def _drawing(curve: Curve, points: _Points, kind: "type[_AnyAxis]") -> Iterator[str]:
    seen = [point for line in points.values() for point in line if point is not None]
    across = kind([x for x, _ in seen], _LEFT, _WIDTH - _RIGHT)
    up = kind([y for _, y in seen], _HEIGHT - _BOTTOM, _TOP)
    yield from _axes(across, up, curve.x_name, curve.y_name)
    for index, (name, line) in enumerate(points.items()):
        yield from _line(name, line, across, up, _class(index))


def _legend(names: Sequence[str]) -> tuple[list[str], int]:
    """Return the legend above a file's plot, and its rows."""
    parts: list[str] = []
    x, row = float(_LEFT), 1
    for index, name in enumerate(names):
        width = 48 + _LETTER * len(name)
        if x > _LEFT and x + width > _WIDTH:
            x, row = float(_LEFT), row + 1
        y = _ROW * row - 4
        parts.append(f'<path class="{_class(index)}" d="M{x:.1f} {y - 4}h24"/>')
        parts.append(f'<text class="axis" x="{x + 30:.1f}" y="{y}">{html.escape(name)}</text>')
        x += width
    return parts, row


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
            yield self.place(value), _label(value, decimals)


class _LogarithmicAxis:
    """From positive values to places, with ticks at 1, 2 and 5 times powers of ten."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        marks = [
            (factor, power)
            for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
            for factor in (1, 2, 5)
        ]
        below = [index for index, mark in enumerate(marks) if _value(mark) <= low * (1 + 1e-9)]
        above = [index for index, mark in enumerate(marks) if _value(mark) >= high * (1 - 1e-9)]
        self._marks = marks[below[-1] : max(above[0], below[-1] + 1) + 1]
        self._few = len(self._marks) <= 12
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        low, high = (math.log10(_value(self._marks[index])) for index in (0, -1))
        return self._start + (math.log10(value) - low) / (high - low) * (self._end - self._start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Yield the place of each tick, and its label; of powers of ten alone where there are many."""
        for mark in self._marks:
            if self._few or mark[0] == 1:
                yield self.place(_value(mark)), _label(_value(mark), max(0, -mark[1]))


_AnyAxis = _Axis | _LogarithmicAxis


def _label(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if decimals <= 5 and abs(value) < 1e7 else f"{value:.4g}"


def _value(mark: tuple[int, int]) -> float:
    factor, power = mark
    return factor * 10.0**power


def _round_step(step: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= step)


def _axes(across: _AnyAxis, up: _AnyAxis, x_name: str, y_name: str) -> Iterator[str]:
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
    name: str,
    line: Sequence[tuple[float, float] | None],
    across: _AnyAxis,
    up: _AnyAxis,
    kind: str,
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
