"""The plots of a sweep's report."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from jebm.report.findings import Drawing
from jebm.report.plots import svg_of
from jebm.sweep.axes import ResultAxis, ValueAxis
from jebm.sweep.importances import Importance
from jebm.sweep.key_drawings import key_map, parallel, slices
from jebm.sweep.marks import COLOURS, MARKERS, having, legend, scatter
from jebm.sweep.results import Sweep, Trial

__all__ = ["best_so_far", "draw"]

_FEWEST_FOR_A_MAP = 8  # finished trials

_MOST_NAMED = 12  # trials of a front


def draw(sweep: Sweep, importances: Sequence[Importance]) -> list[Drawing]:
    """Return the plots that have something to show; `importances` order the searched keys."""
    keys = [item.key for item in importances] or list(sweep.space)
    keys = [key for key in keys if not sweep.space[key].single()]
    finished = len(sweep.having("finished"))
    plots = []
    if len(sweep.objectives) > 1 and finished:
        plots.append(_pareto(sweep))
    if finished > 1:
        plots.append(_history(sweep))
    if any(trial.curve for trial in sweep.trials):
        plots.append(_curves(sweep))
    if finished > 1 and keys:
        plots.append(slices(sweep, keys))
    if len(keys) > 1 and len(having(sweep.having("finished"), keys[:2])) >= _FEWEST_FOR_A_MAP:
        plots.append(key_map(sweep, (keys[0], keys[1]), by_importance=bool(importances)))
    if finished > 1:
        plots.append(parallel(sweep, keys))
    return plots


# ── History, front, curves ──────────────────────────────────────────────────────────────────────────────


def best_so_far(sweep: Sweep) -> list[Trial]:
    """Return the finished trials that beat all earlier ones in the first objective."""
    sign = sweep.objectives[0].sign
    found: list[Trial] = []
    for trial in sweep.having("finished"):
        if not found or sign * trial.values[0] < sign * found[-1].values[0]:
            found.append(trial)
    return found


def _history(sweep: Sweep) -> Drawing:
    axis = ResultAxis.of(sweep)
    best = best_so_far(sweep)

    def fill(canvas: Canvas) -> None:
        axes: Axes = canvas.subplots()
        axis.values.lay_out(axes, "y")
        scatter(axes, sweep, sweep.judged, x=lambda trial: trial.number, y=axis.level)
        line_x = [*(trial.number for trial in best), sweep.trials[-1].number]
        line_y = [*(trial.values[0] for trial in best), best[-1].values[0]]
        axes.step(line_x, line_y, where="post", color=COLOURS["best"], label="best so far")
        axes.set_xlim(-0.7, len(sweep.trials) - 0.3)
        axes.set_xlabel("trial")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(canvas)

    still = "falls" if sweep.objectives[0].sign > 0 else "rises"
    return Drawing(
        "How the search went",
        svg_of(fill),
        f"Each mark is a trial, in the order of their starts. While the line of the best so far still "
        f"{still}, more trials pay. It last moved at {best[-1].name} of {len(sweep.trials)}.{axis.note}",
    )


def _pareto(sweep: Sweep) -> Drawing:
    finished, front = sweep.having("finished"), sweep.front()
    others = [trial for trial in finished if trial not in front]

    def fill(canvas: Canvas) -> None:
        axes: Axes = canvas.subplots()
        for side, objective in (("x", 0), ("y", 1)):
            _front_axis(sweep, objective).lay_out(axes, side)
        scatter(axes, sweep, others, x=lambda trial: trial.values[0], y=lambda trial: trial.values[1])
        x, y = ([trial.values[i] for trial in front] for i in (0, 1))
        axes.plot(x, y, color=COLOURS["best"], linestyle=":", linewidth=1)
        axes.scatter(x, y, s=90, marker="*", color=COLOURS["best"], label="Pareto front", gid="front")
        for trial in front[: _MOST_NAMED if len(front) <= _MOST_NAMED else 0]:
            axes.annotate(
                trial.name,
                (trial.values[0], trial.values[1]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
        legend(canvas)

    # Which way is better on each axis.
    left = "left" if sweep.objectives[0].sign > 0 else "right"
    down = "down" if sweep.objectives[1].sign > 0 else "up"
    count = len(sweep.objectives)
    more = f" Only the first two of {count} are drawn." if count > 2 else ""
    return Drawing(
        "The Pareto front",
        svg_of(fill, height=4.2),
        f"Each mark is a finished trial; none beats a starred one in every objective. Better is {left} and "
        f"{down}; choose a star where the dotted line bends.{more} Trials far from the front lie beyond the "
        "axes.",
    )


def _front_axis(sweep: Sweep, objective: int) -> ValueAxis:
    """Return an axis that holds the front and, of all finished trials, the better half."""
    sign = sweep.objectives[objective].sign
    costs = sorted(sign * trial.values[objective] for trial in sweep.having("finished"))
    farthest = max(sign * trial.values[objective] for trial in sweep.front())
    limit = max(farthest, costs[len(costs) // 2])
    return ValueAxis.of(sweep.objectives[objective], [sign * cost for cost in costs if cost <= limit])


def _curves(sweep: Sweep) -> Drawing:
    objective, best = sweep.objectives[0], sweep.best()
    drawn = [trial for trial in sweep.trials if trial.curve]
    axis = ValueAxis.of(objective, [value for trial in drawn for _, value in trial.curve], log_over=4)

    def fill(canvas: Canvas) -> None:
        axes: Axes = canvas.subplots()
        axis.lay_out(axes, "y")
        for trial in sorted(drawn, key=lambda trial: trial is best):  # the best on top
            role = "best" if trial is best else trial.status
            x, y = zip(*trial.curve, strict=True)
            style: dict[str, Any] = {"linewidth": 2.6} if role == "best" else {"linewidth": 1.0, "alpha": 0.7}
            ends = MARKERS.get(role, "o" if role == "pruned" or len(x) == 1 else "")
            axes.plot(
                x, y, color=COLOURS[role], marker=ends, markevery=[-1], markersize=5, gid=trial.name, **style
            )
        for status in dict.fromkeys(trial.status for trial in drawn if trial is not best):
            axes.plot([], [], color=COLOURS[status], label=status)
        if best is not None and best.curve:
            axes.plot([], [], color=COLOURS["best"], linewidth=2.6, label=f"best ({best.name})")
        axes.set_xlim(0, 1.03 * max(trial.curve[-1][0] for trial in drawn))
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        legend(canvas)

    return Drawing(
        "Learning curves",
        svg_of(fill, height=3.8),
        f"One line for each trial: {objective.metric} against the images that it saw; a mark ends what was "
        "stopped. Where lines cross late, pruning is risky; where the thick line still moves at its end, "
        f"longer training pays.{axis.note}",
    )
