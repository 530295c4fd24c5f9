"""The figures of a sweep's report, as plain data for plotly.js.

Colours are names of roles (`finished`, `best`, `rank:0.3`), which report.js turns into those of the theme.
Every text in a figure that stems from the sweep passes through `_text`: plotly reads a little markup.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from jebm.sweep.results import (
    STATUSES,
    Importance,
    Sweep,
    Trial,
    Value,
    number,
    ordered_choices,
    position,
    setting,
    sign_of,
)
from jebm.sweep.space import Objective

__all__ = ["Figure", "draw"]

_SYMBOLS = {
    "finished": "circle",
    "pruned": "circle-open",
    "diverged": "x-thin-open",
    "failed": "cross-thin-open",
    "running": "diamond-open",
}
_FEWEST_FOR_A_MAP = 8  # finished trials
_CELLS = 48  # of a map, along each side


@dataclass(frozen=True)
class Figure:
    """A figure: its title, one plain line that says what it means and how to read it, traces and layout.

    `data` is empty where there is nothing to draw yet.
    """

    name: str
    title: str
    meaning: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 400


def draw(sweep: Sweep, importances: Sequence[Importance]) -> list[Figure]:
    """Return the figures in the order of the report; `importances` order the searched keys."""
    keys = [item.key for item in importances] or list(sweep.space)
    keys = [key for key in keys if not sweep.space[key].single()]
    front = [_pareto(sweep)] if len(sweep.objectives) > 1 else []
    return [
        *front,
        _history(sweep),
        _curves(sweep),
        _slices(sweep, keys),
        _map(sweep, keys[:2], by_importance=bool(importances)),
        _parallel(sweep, keys),
    ]


# ── History, front, curves ──────────────────────────────────────────────────────────────────────────────


def _history(sweep: Sweep) -> Figure:
    objective = sweep.objectives[0]
    sign = sign_of(objective)
    axis, level, note = _result_axis(sweep)
    data = _by_status(sweep, _ended(sweep), x=lambda trial: trial.number, y=level)
    so_far: list[Trial] = []
    for trial in sweep.having("finished"):
        if not so_far or sign * trial.values[0] < sign * so_far[-1].values[0]:
            so_far.append(trial)
    ends = [sweep.trials[-1].number] if so_far else []
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [*(trial.number for trial in so_far), *ends],
            "y": [*(trial.values[0] for trial in so_far), *(so_far[-1].values[0] for _ in ends)],
            "line": {"shape": "hv", "width": 2, "color": "best"},
            "hoverinfo": "skip",
        }
    )
    moved = f" It last moved at {so_far[-1].name} of {len(sweep.trials)}." if so_far else ""
    return Figure(
        "history",
        "How the search went",
        f"Each mark is a trial, in the order of their starts. While the line of the best so far still "
        f"{'falls' if sign > 0 else 'rises'}, more trials pay.{moved}{note}",
        data if len(sweep.having("finished")) > 1 else [],
        {
            "xaxis": {
                "title": {"text": "trial"},
                "tickformat": "d",
                "range": [-0.7, len(sweep.trials) - 0.3],
            },
            "yaxis": axis,
        },
    )


def _pareto(sweep: Sweep) -> Figure:
    first, second = sweep.objectives[:2]
    finished, front = sweep.having("finished"), sweep.front()
    others = [trial for trial in finished if trial not in front]
    data = _by_status(sweep, others, x=lambda trial: trial.values[0], y=lambda trial: trial.values[1])
    data.append(
        {
            "type": "scatter",
            "mode": "lines+markers+text" if len(front) <= 12 else "lines+markers",
            "name": "Pareto front",
            "x": [trial.values[0] for trial in front],
            "y": [trial.values[1] for trial in front],
            "text": [trial.name for trial in front],
            "textposition": [("top right", "bottom left")[i % 2] for i in range(len(front))],
            "hovertext": [_hover(sweep, trial) for trial in front],
            "hoverinfo": "text",
            "marker": {"color": "best", "size": 11, "symbol": "star"},
            "line": {"color": "best", "width": 1, "dash": "dot"},
        }
    )
    x_axis, y_axis = _front_axis(sweep, 0), _front_axis(sweep, 1)
    count = len(sweep.objectives)
    more = f" Only the first two of {count} are drawn." if count > 2 else ""
    return Figure(
        "pareto",
        "The Pareto front",
        f"Each mark is a finished trial; none beats a starred one in every objective. Better is "
        f"{'left' if sign_of(first) > 0 else 'right'} and {'down' if sign_of(second) > 0 else 'up'}; choose "
        f"a star where the dotted line bends.{more} Trials far from the front lie beyond the axes.",
        data if finished else [],
        {"xaxis": x_axis, "yaxis": y_axis},
        480,
    )


def _front_axis(sweep: Sweep, objective: int) -> dict[str, Any]:
    """Return an axis that holds the front and, of all finished trials, the better half."""
    sign = sign_of(sweep.objectives[objective])
    costs = sorted(sign * trial.values[objective] for trial in sweep.having("finished"))
    farthest = max((sign * trial.values[objective] for trial in sweep.front()), default=0.0)
    limit = max(farthest, costs[len(costs) // 2] if costs else 0.0)
    return _value_axis(sweep.objectives[objective], [sign * cost for cost in costs if cost <= limit])[0]


def _curves(sweep: Sweep) -> Figure:
    objective, best = sweep.objectives[0], sweep.best()
    shown = [trial for trial in sweep.trials if trial.curve]
    ends = [trial for trial in shown if trial.status in ("pruned", "diverged", "failed")]
    axis, beyond = _value_axis(objective, [value for trial in shown for _, value in trial.curve], log_over=4)
    most = max((trial.curve[-1][0] for trial in shown), default=1)
    data: list[dict[str, Any]] = []
    for status in STATUSES:
        group = [trial for trial in shown if trial.status == status and trial is not best]
        data += [
            _curve(sweep, trial, status, first=i == 0, width=1.2, opacity=0.75)
            for i, trial in enumerate(group)
        ]
    if ends:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "showlegend": False,
                "x": [trial.curve[-1][0] for trial in ends],
                "y": [trial.curve[-1][1] for trial in ends],
                "hovertext": [_hover(sweep, trial) for trial in ends],
                "hoverinfo": "text",
                "marker": {
                    "color": [trial.status for trial in ends],
                    "symbol": [_SYMBOLS[trial.status] for trial in ends],
                    "size": 7,
                    "line": {"width": 1.5},
                },
            }
        )
    if best is not None and best.curve:
        data.append(_curve(sweep, best, "best", first=True, width=3, opacity=1))
    return Figure(
        "curves",
        "Learning curves",
        f"One line for each trial: {objective.metric} against the images that it saw; a mark ends what was "
        f"stopped. Where lines cross late, pruning is risky; where the thick line still moves at its end, "
        f"longer training pays." + _beyond(beyond),
        data,
        {
            "xaxis": {"title": {"text": "images seen"}, "tickformat": ",d", "range": [0, 1.03 * most]},
            "yaxis": axis,
        },
        440,
    )


def _curve(
    sweep: Sweep, trial: Trial, role: str, *, first: bool, width: float, opacity: float
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines" if len(trial.curve) > 1 else "markers",
        "name": f"best ({trial.name})" if role == "best" else role,
        "legendgroup": role,
        "showlegend": first,
        "x": [images for images, _ in trial.curve],
        "y": [value for _, value in trial.curve],
        "line": {"color": role, "width": width},
        "marker": {"color": role, "size": 5},
        "opacity": opacity,
        "hovertext": _hover(sweep, trial),
        "hoverinfo": "text",
    }


# ── The searched keys ───────────────────────────────────────────────────────────────────────────────────


def _slices(sweep: Sweep, keys: Sequence[str]) -> Figure:
    objective = sweep.objectives[0]
    shown = _ended(sweep)
    axis, level, note = _result_axis(sweep)
    columns = min(3, max(1, len(keys)))
    rows = math.ceil(len(keys) / columns)
    height = 90 + 250 * rows
    layout: dict[str, Any] = {}
    data: list[dict[str, Any]] = []
    for i, key in enumerate(keys):
        row, column = divmod(i, columns)
        suffix = "" if i == 0 else str(i + 1)
        gap_x, gap_y = 0.05, 90 / height
        width, tall = (1 - gap_x * (columns - 1)) / columns, (1 - gap_y * (rows - 1)) / max(rows, 1)
        left, top = column * (width + gap_x), 1 - row * (tall + gap_y)
        x_axis = _key_axis(sweep, key, f"y{suffix}")
        layout[f"xaxis{suffix}"] = x_axis | {"domain": [left, min(1, left + width)]}
        layout[f"yaxis{suffix}"] = axis | {
            "domain": [max(0, top - tall), top],
            "anchor": f"x{suffix}",
            "title": {"text": _text(objective.metric) if column == 0 else ""},
            "showticklabels": column == 0,
            **({"matches": "y"} if i else {}),
        }
        having = [trial for trial in shown if key in trial.params]
        traces = _by_status(sweep, having, x=partial(_on_axis, sweep, key), y=level)
        data += [
            trace | {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "showlegend": i == 0} for trace in traces
        ]
    return Figure(
        "slices",
        "Each searched key by itself",
        f"Each panel has the trials over the values of one key, the whole searched range wide"
        f"{', most important key first' if len(keys) > 1 else ''}. A slope or a valley of the filled marks "
        f"is an effect, a flat cloud none; good marks crowding an edge ask for a wider range.{note}",
        data if len(sweep.having("finished")) > 1 else [],
        layout,
        height,
    )


def _map(sweep: Sweep, keys: Sequence[str], *, by_importance: bool) -> Figure:
    title = "Two keys together"
    finished = [trial for trial in sweep.having("finished") if all(key in trial.params for key in keys)]
    if len(keys) < 2 or len(finished) < _FEWEST_FOR_A_MAP:
        return Figure("map", title, "", [], {})
    objective = sweep.objectives[0]
    places = np.array(
        [[_place(sweep, key, trial.params[key]) for key in keys] for trial in finished], dtype=float
    )
    values = np.array([trial.values[0] for trial in finished])
    axis, _ = _value_axis(objective, values.tolist())
    if axis["type"] == "log":
        values = np.log10(values)
    low, high = axis["range"]
    values = np.clip(values, low, high)
    grids = [_grid(sweep, key) for key in keys]
    surface = _smooth(
        places, values, [[_place(sweep, key, v) for v in grids[i]] for i, key in enumerate(keys)]
    )
    categories = [isinstance(sweep.space[key], CategoricalDistribution) for key in keys]
    ticks = np.linspace(low, high, 5)
    ticktext = [f"{10**tick if axis['type'] == 'log' else tick:.3g}" for tick in ticks]
    stopped = [
        trial for trial in sweep.having("pruned", "diverged") if all(key in trial.params for key in keys)
    ]
    data: list[dict[str, Any]] = [
        {
            "type": "heatmap" if any(categories) else "contour",
            "x": [_coordinate(sweep, keys[0], value) for value in grids[0]],
            "y": [_coordinate(sweep, keys[1], value) for value in grids[1]],
            "z": [[None if math.isnan(z) else round(float(z), 9) for z in row] for row in surface.T],
            "zmin": low,
            "zmax": high,
            "colorscale": "good is low" if sign_of(objective) > 0 else "good is high",
            "colorbar": {
                "title": {"text": _text(objective.metric), "side": "right", "font": {"size": 12}},
                "tickvals": ticks.tolist(),
                "ticktext": ticktext,
                "outlinewidth": 0,
                "thickness": 14,
            },
            "hoverinfo": "skip",
            **(
                {}
                if any(categories)
                else {"contours": {"coloring": "heatmap"}, "line": {"width": 0.5, "color": "edge"}}
            ),
        }
    ]
    data += [
        trace | {"marker": trace["marker"] | {"line": {"width": 1.5, "color": "edge"}}}
        for trace in _by_status(
            sweep,
            [*finished, *stopped],
            x=partial(_on_axis, sweep, keys[0]),
            y=partial(_on_axis, sweep, keys[1]),
        )
    ]
    chosen = "the two most important keys" if by_importance else "the first two keys by name"
    return Figure(
        "map",
        title,
        f"{objective.metric} over {keys[0]} and {keys[1]}, {chosen}, smoothed from {len(finished)} finished "
        f"trials: the stronger the colour the better, blank where no trial was near. A slanted valley means "
        f"that the two must be set together.",
        data,
        {"xaxis": _key_axis(sweep, keys[0], "y"), "yaxis": _key_axis(sweep, keys[1], "x")},
        500,
    )


def _smooth(places: np.ndarray, values: np.ndarray, axes: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the mean of the values around each grid point, weighted by a Gaussian of their distance.

    Places are (trials, 2) in [0, 1]; its width shrinks with their number. NaN further than three widths
    from every trial: no claim without a trial nearby.
    """
    width = max(0.06, 0.35 / math.sqrt(len(values)))
    x, y = np.meshgrid(axes[0], axes[1], indexing="ij")
    squares = (x[..., None] - places[:, 0]) ** 2 + (y[..., None] - places[:, 1]) ** 2
    nearest = squares.min(axis=-1)
    weights = np.exp(-(squares - nearest[..., None]) / (2 * width**2))
    surface = (weights * values).sum(axis=-1) / weights.sum(axis=-1)
    surface[nearest > (3 * width) ** 2] = np.nan
    return np.asarray(surface)


def _parallel(sweep: Sweep, keys: Sequence[str]) -> Figure:
    """Lines over parallel axes, the objectives' first; as SVG lines, which print and need no WebGL."""
    finished = sweep.ranking()
    data: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    axes: list[tuple[str, dict[int, float], list[tuple[float, str]]]] = []
    for i, objective in enumerate(sweep.objectives):
        values = [trial.values[i] for trial in finished]
        axis, _ = _value_axis(objective, values)
        low, high = axis["range"]
        log = axis["type"] == "log"
        scaled = [
            min(1.0, max(0.0, ((math.log10(value) if log else value) - low) / (high - low)))
            for value in values
        ]
        labels = [
            (at, number(10 ** (low + at * (high - low)) if log else low + at * (high - low)))
            for at in (0.0, 0.5, 1.0)
        ]
        axes.append(
            (objective.metric, {t.number: at for t, at in zip(finished, scaled, strict=True)}, labels)
        )
    for key in keys:
        marks = {
            trial.number: _place(sweep, key, trial.params[key]) for trial in finished if key in trial.params
        }
        axes.append((key, marks, _marks(sweep, key)))
    for place, (name, _, labels) in enumerate(axes):
        # Every other name a line higher: neighbours are often long.
        annotations.append(_note(place, 1.0, name, yanchor="bottom", yshift=12 + 17 * (place % 2)))
        annotations += [
            _note(place, at, label, xanchor="right", xshift=-5, bgcolor="page") for at, label in labels
        ]
    for rank, trial in reversed(list(enumerate(finished))):  # the best on top
        share = rank / max(1, len(finished) - 1)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "showlegend": False,
                "x": list(range(len(axes))),
                "y": [marks.get(trial.number) for _, marks, _ in axes],
                "line": {
                    "color": "best" if rank == 0 else f"rank:{share:.3f}",
                    "width": 3.5 if rank == 0 else 1.6,
                },
                "opacity": 1 if rank == 0 else 0.85 - 0.45 * share,
                "hovertext": _hover(sweep, trial),
                "hoverinfo": "text",
            }
        )
    bars = [
        {
            "type": "line",
            "x0": place,
            "x1": place,
            "y0": 0,
            "y1": 1,
            "layer": "below",
            "line": {"width": 1, "color": "axis"},
        }
        for place in range(len(axes))
    ]
    return Figure(
        "parallel",
        "All keys together",
        "One line for each finished trial, through its values: the stronger its colour the better, the "
        "thick one is the best. Where strong lines run together, the value matters; where they fan out, it "
        "does not.",
        data if len(finished) > 1 else [],
        {
            "xaxis": {"range": [-0.6, len(axes) - 0.6], "visible": False, "fixedrange": True},
            "yaxis": {"range": [-0.06, 1.06], "visible": False, "fixedrange": True},
            "annotations": annotations,
            "shapes": bars,
            "margin": {"l": 20, "r": 20, "t": 72, "b": 16},
        },
        440,
    )


# ── Parts ───────────────────────────────────────────────────────────────────────────────────────────────


def _text(value: object) -> str:
    """Return text that plotly shows as it is."""
    return html.escape(str(value), quote=False)


def _hover(sweep: Sweep, trial: Trial) -> str:
    """Return what a trial's mark shows under the pointer."""
    lines = [f"{trial.name}: {trial.status}, {trial.images:,} images"]
    if trial.values:
        lines += [f"{o.metric} = {number(v)}" for o, v in zip(sweep.objectives, trial.values, strict=True)]
    elif trial.last is not None:
        lines.append(f"{sweep.objectives[0].metric} = {number(trial.last)} at the last report")
    lines += [f"{key} = {setting(value)}" for key, value in trial.params.items()]
    return "<br>".join(_text(line) for line in lines)


def _by_status(
    sweep: Sweep, trials: Sequence[Trial], *, x: Callable[[Trial], Any], y: Callable[[Trial], Any]
) -> list[dict[str, Any]]:
    """Return the marks of trials, one trace for each status; the best of a single objective has a star."""
    best = sweep.best() if len(sweep.objectives) == 1 else None
    groups = {status: [t for t in trials if t.status == status and t is not best] for status in STATUSES}
    groups["best"] = [trial for trial in trials if trial is best]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"best ({group[0].name})" if role == "best" else role,
            "legendgroup": role,
            "x": [x(trial) for trial in group],
            "y": [y(trial) for trial in group],
            "hovertext": [_hover(sweep, trial) for trial in group],
            "hoverinfo": "text",
            "marker": {
                "color": role,
                "symbol": _SYMBOLS.get(role, "star"),
                "size": 15 if role == "best" else 8,
                "line": {"width": 1.5, "color": role},
            },
        }
        for role, group in groups.items()
        if group
    ]


def _ended(sweep: Sweep) -> list[Trial]:
    return sweep.having("finished", "pruned", "diverged")


def _result_axis(sweep: Sweep) -> tuple[dict[str, Any], Callable[[Trial], float], str]:
    """Return an axis for the first objective, where each ended trial lies on it, and a note on that.

    Stopped trials have no result that compares with the others': they lie in a row along the bad end.
    """
    objective = sweep.objectives[0]
    axis, beyond = _value_axis(objective, [trial.values[0] for trial in sweep.having("finished")])
    low, high = axis["range"]
    room = 0.12 * (high - low)
    row = high + room / 2 if sign_of(objective) > 0 else low - room / 2
    stopped = sweep.having("pruned", "diverged")
    if stopped:
        axis["range"] = [low, high + room] if sign_of(objective) > 0 else [low - room, high]
    place = float(10**row if axis["type"] == "log" else row)
    edge = "top" if sign_of(objective) > 0 else "bottom"
    note = f" Stopped trials, which have no final value, stand in a row at the {edge}." if stopped else ""
    return axis, lambda trial: trial.values[0] if trial.values else place, note + _beyond(beyond)


def _value_axis(
    objective: Objective, values: Sequence[float], *, log_over: float = 20
) -> tuple[dict[str, Any], int]:
    """Return an axis for values of an objective, and how many of them lie beyond it.

    It ends where the bad values thin out, so that one trial near divergence does not flatten the others:
    three times as far from the best as three quarters of the values are. Logarithmic where the largest is
    more than `log_over` times the smallest.
    """
    if not values:
        return {"type": "linear", "range": [0, 1], "title": {"text": _text(objective.metric)}}, 0
    sign = sign_of(objective)
    bad = np.sort(sign * np.asarray(values, dtype=float))
    fence = bad[0] + 3 * (np.quantile(bad, 0.75) - bad[0])
    kept = sign * bad[bad <= fence]
    low, high = float(kept.min()), float(kept.max())
    log = low > 0 and high / low > log_over
    if log:
        low, high = math.log10(low), math.log10(high)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axis = {
        "type": "log" if log else "linear",
        "range": [low - margin, high + margin],
        "title": {"text": _text(objective.metric)},
        **(_log_ticks(low - margin, high + margin) if log else {}),
    }
    return axis, len(values) - len(kept)


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Return ticks for a logarithmic axis between two powers of ten: decades, or 1, 2, 5 in few of them."""
    digits = (1,) if high - low > 2.2 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return {"tickvals": ticks, "ticktext": [number(tick) for tick in ticks]}


def _beyond(count: int) -> str:
    return f" {count} {'value lies' if count == 1 else 'values lie'} beyond the axis." if count else ""


def _key_axis(sweep: Sweep, key: str, anchor: str) -> dict[str, Any]:
    distribution = sweep.space[key]
    axis: dict[str, Any] = {"title": {"text": _text(key)}, "anchor": anchor, "zeroline": False}
    if isinstance(distribution, FloatDistribution | IntDistribution):
        low, high = float(distribution.low), float(distribution.high)
        if distribution.log:
            low, high = math.log10(low), math.log10(high)
            axis |= {"type": "log"} | _log_ticks(low, high)
        else:
            axis |= {"type": "linear", "nticks": 6}
        margin = 0.04 * (high - low)
        return axis | {"range": [low - margin, high + margin]}
    choices = _choices(sweep, key)
    return axis | {
        "type": "linear",
        "range": [-0.5, len(choices) - 0.5],
        "tickvals": list(range(len(choices))),
        "ticktext": [_text(setting(choice)) for choice in choices],
    }


def _choices(sweep: Sweep, key: str) -> list[Value]:
    """Return the choices of a key, in their order where they have one."""
    distribution = sweep.space[key]
    choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else ()
    return list(ordered_choices(distribution) or choices)


def _coordinate(sweep: Sweep, key: str, value: Value) -> Value:
    """Return where a value lies on the key's axis: itself, or the index of a choice."""
    choices = _choices(sweep, key)
    return choices.index(value) if choices else value


def _on_axis(sweep: Sweep, key: str, trial: Trial) -> Value:
    return _coordinate(sweep, key, trial.params[key])


def _place(sweep: Sweep, key: str, value: Value) -> float:
    """Return where a value lies between the ends of its range, 0 to 1; choices in their order."""
    choices = _choices(sweep, key)
    place = choices.index(value) / (len(choices) - 1) if choices else position(sweep.space[key], value)
    return 0.5 if place is None else place


def _grid(sweep: Sweep, key: str) -> list[Value]:
    """Return values from end to end of what was searched, evenly on its scale; all choices."""
    distribution = sweep.space[key]
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return _choices(sweep, key)
    space = np.geomspace if distribution.log else np.linspace
    values: list[Value] = space(distribution.low, distribution.high, _CELLS).tolist()
    return values


def _marks(sweep: Sweep, key: str) -> list[tuple[float, str]]:
    """Return (place, label) for a key's axis among parallel ones."""
    distribution = sweep.space[key]
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return [(_place(sweep, key, choice), setting(choice)) for choice in _choices(sweep, key)]
    low, high = float(distribution.low), float(distribution.high)
    middle = math.sqrt(low * high) if distribution.log else (low + high) / 2
    return [(0.0, number(low)), (0.5, f"{middle:.2g}"), (1.0, number(high))]


def _note(x: float, y: float, text: str, **layout: str | int) -> dict[str, Any]:
    return {"x": x, "y": y, "text": _text(text), "showarrow": False, "font": {"size": 11}, **layout}
