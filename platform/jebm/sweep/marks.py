"""Trials as marks: one colour and shape per status, in all plots of a sweep."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from jebm.sweep.results import STATUSES, Sweep, Trial

__all__ = ["COLOURS", "MARKERS", "having", "legend", "scatter"]

COLOURS = {
    "finished": "#0072b2",
    "pruned": "#8a95a1",
    "diverged": "#d1440c",
    "failed": "#a83f86",
    "running": "#00876a",
    "waiting": "#8a95a1",
    "best": "#b07300",
}
"""Colours by status; `best` is the best trial of a single objective."""

MARKERS = {"diverged": "x", "failed": "+", "running": "D", "best": "*"}
_OPEN = ("pruned", "running")


def having(trials: Sequence[Trial], keys: Sequence[str]) -> list[Trial]:
    """Return the trials that have a value for each key."""
    return [trial for trial in trials if all(key in trial.params for key in keys)]


def scatter(
    axes: Axes,
    sweep: Sweep,
    trials: Sequence[Trial],
    *,
    x: Callable[[Trial], float],
    y: Callable[[Trial], float],
    edge: str | None = None,
) -> None:
    """Draw the marks of trials, grouped by status; the best of a single objective is a star."""
    best = sweep.best() if len(sweep.objectives) == 1 else None
    # One group, and one legend entry, per status.
    groups = {status: [t for t in trials if t.status == status and t is not best] for status in STATUSES}
    groups["best"] = [trial for trial in trials if trial is best]
    for role, group in groups.items():
        if not group:
            continue
        colour = edge or COLOURS[role]
        hollow = role in _OPEN or role in ("diverged", "failed")
        axes.scatter(
            [x(trial) for trial in group],
            [y(trial) for trial in group],
            s=110 if role == "best" else 26,
            marker=MARKERS.get(role, "o"),
            facecolors=("none" if role in _OPEN else colour) if hollow else COLOURS[role],
            edgecolors=None if MARKERS.get(role) in ("x", "+") else colour,
            linewidths=1.1,
            label=f"best ({group[0].name})" if role == "best" else role,
            gid=role,
            zorder=3,
        )


def legend(canvas: Canvas) -> None:
    """Put one legend above a plot, each label once."""
    found: dict[str, Any] = {}
    for axes in canvas.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) > 1:
        canvas.legend(
            list(found.values()), list(found), loc="outside upper left", ncols=min(5, len(found)), fontsize=9
        )
