"""Plots of a sweep over its searched keys: each separately, two together, all together."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from jebm.report.findings import Drawing, number
from jebm.report.plots import svg_of, text_of
from jebm.sweep.axes import KeyAxis, ResultAxis, ValueAxis
from jebm.sweep.marks import COLOURS, having, legend, scatter
from jebm.sweep.results import Sweep, Trial

__all__ = ["key_map", "parallel", "slices", "smooth"]

_CELLS = 32  # of a map, along each side
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a map's colours that are labelled


def slices(sweep: Sweep, keys: Sequence[str]) -> Drawing:
    """Return a panel for each key that plots the trials over its values."""
    axis = ResultAxis.of(sweep)
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)

    def fill(canvas: Canvas) -> None:
        grid = canvas.subplots(rows, columns, squeeze=False, sharey=True)
        for index, axes in enumerate(grid.flat):
            if index >= len(keys):
                axes.set_axis_off()
                continue
            key = KeyAxis.of(sweep, keys[index])
            axis.values.lay_out(axes, "y", title=index % columns == 0)
            key.lay_out(axes, "x")
            scatter(
                axes,
                sweep,
                having(sweep.judged, [key.key]),
                x=partial(_on_axis, key),
                y=axis.level,
            )
        legend(canvas)

    ordered = ", most important key first" if len(keys) > 1 else ""
    return Drawing(
        "Each searched key by itself",
        svg_of(fill, height=0.7 + 2.4 * rows),
        f"Each panel has the trials over the values of one key, the whole searched range wide{ordered}. "
        "A slope or a valley of the filled marks is an effect, a flat cloud none; good marks crowding an "
        f"edge ask for a wider range.{axis.note}",
    )


def _on_axis(key: KeyAxis, trial: Trial) -> float:
    return key.coordinate(trial.params[key.key])


def smooth(
    places: np.ndarray, values: np.ndarray, axes: tuple[Sequence[float], Sequence[float]]
) -> np.ndarray:
    """Return the mean of the values around each grid point, with Gaussian weights in the distance.

    Places are (trials, 2) in [0, 1]; the Gaussian's width shrinks with their number. NaN further than three
    widths from every trial, since there is no evidence there.
    """
    width = max(0.06, 0.35 / math.sqrt(len(values)))
    x, y = np.meshgrid(*axes, indexing="ij")
    squares = (x[..., None] - places[:, 0]) ** 2 + (y[..., None] - places[:, 1]) ** 2
    nearest = squares.min(axis=-1)
    weights = np.exp(-(squares - nearest[..., None]) / (2 * width**2))
    surface = (weights * values).sum(axis=-1) / weights.sum(axis=-1)
    surface[nearest > (3 * width) ** 2] = np.nan
    return np.asarray(surface)


def key_map(sweep: Sweep, keys: tuple[str, str], *, by_importance: bool) -> Drawing:
    """Return the first objective over two keys, smoothed."""
    finished = having(sweep.having("finished"), keys)
    axis = ValueAxis.of(sweep.objectives[0], [trial.values[0] for trial in finished])
    sides = KeyAxis.of(sweep, keys[0]), KeyAxis.of(sweep, keys[1])
    grids = [side.grid(_CELLS) for side in sides]
    # Smooth over places in [0, 1], so that both keys count alike.
    surface = smooth(
        np.array([[side.scaled(trial.params[side.key]) for side in sides] for trial in finished]),
        np.array([axis.scaled(trial.values[0]) for trial in finished]),
        ([sides[0].scaled(v) for v in grids[0]], [sides[1].scaled(v) for v in grids[1]]),
    )
    marked = [*finished, *having(sweep.having("pruned", "diverged"), keys)]

    def fill(canvas: Canvas) -> None:
        axes: Axes = canvas.subplots()
        for side, key in zip("xy", sides, strict=True):
            key.lay_out(axes, side)
        x, y = ([key.coordinate(v) for v in grid] for key, grid in zip(sides, grids, strict=True))
        colours = "Blues_r" if sweep.objectives[0].sign > 0 else "Blues"
        values = np.ma.masked_invalid(surface.T)
        cells = axes.pcolormesh(x, y, values, vmin=0, vmax=1, cmap=colours, shading="nearest")
        bar = canvas.colorbar(cells, ax=axes, label=text_of(axis.name))
        bar.set_ticks(_SHARES, labels=[f"{axis.at(share):.3g}" for share in _SHARES])
        across, up = (partial(_on_axis, side) for side in sides)
        scatter(axes, sweep, marked, x=across, y=up, edge="#1c2024")
        legend(canvas)

    chosen = "the two most important keys" if by_importance else "the first two keys by name"
    return Drawing(
        "Two keys together",
        svg_of(fill, height=4.2),
        f"{sweep.objectives[0].metric} over {keys[0]} and {keys[1]}, {chosen}, smoothed from "
        f"{len(finished)} finished trials: the stronger the colour the better, blank where no trial was "
        "near. A slanted valley means that the two must be set together.",
    )


_Column = tuple[str, dict[int, float], list[tuple[float, str]]]
"""One of the parallel axes: its name, trial number -> place on it, and its labels."""


def parallel(sweep: Sweep, keys: Sequence[str]) -> Drawing:
    """Return a line for each finished trial through its values on parallel axes, objectives first."""
    finished = sweep.ranking()
    columns: list[_Column] = []
    for i, objective in enumerate(sweep.objectives):
        axis = ValueAxis.of(objective, [trial.values[i] for trial in finished])
        marks = {trial.number: axis.scaled(trial.values[i]) for trial in finished}
        columns.append((objective.metric, marks, [(at, number(axis.at(at))) for at in (0.0, 0.5, 1.0)]))
    for key in (KeyAxis.of(sweep, name) for name in keys):
        marks = {t.number: key.scaled(t.params[key.key]) for t in finished if key.key in t.params}
        columns.append((key.key, marks, key.marks()))

    def fill(canvas: Canvas) -> None:
        axes: Axes = canvas.subplots()
        for rank, trial in reversed(list(enumerate(finished))):  # the best on top
            share = rank / max(1, len(finished) - 1)
            places = [marks.get(trial.number, math.nan) for _, marks, _ in columns]
            style: dict[str, Any] = {"color": COLOURS["finished"], "alpha": 0.85 - 0.7 * share}
            if rank == 0:
                style = {"color": COLOURS["best"], "linewidth": 3.0}
            axes.plot(range(len(columns)), places, gid=trial.name, **style)
        _label(axes, columns)

    return Drawing(
        "All keys together",
        svg_of(fill, height=4.2),
        "One line for each finished trial, through its values: the stronger its colour the better, the thick "
        "one is the best. Where strong lines run together, the value matters; where they fan out, it "
        "does not.",
    )


def _label(axes: Axes, columns: Sequence[_Column]) -> None:
    """Draw the parallel axes with their names and labels only."""
    box = {"color": "white", "pad": 0.5}
    for place, (_, _, labels) in enumerate(columns):
        axes.axvline(place, color="#9aa5b1", linewidth=0.8, zorder=0)
        for at, label in labels:
            axes.text(place - 0.04, at, text_of(label), ha="right", va="center", fontsize=8, bbox=box)
    axes.set_xticks(range(len(columns)), [text_of(name) for name, _, _ in columns], rotation=20, ha="right")
    axes.set_xlim(-0.6, len(columns) - 0.6)
    axes.set_ylim(-0.06, 1.06)
    axes.yaxis.set_visible(False)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
