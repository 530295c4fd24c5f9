"""Runs beside each other as findings: how their configs differ, curves, evaluations, seeds, pictures."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure as Canvas

from jebm.campaign.traces import Trace, picture_of
from jebm.config import role_of
from jebm.evaluate.statistics import t_interval
from jebm.report.catalogue import of_metric
from jebm.report.findings import NONE, Cell, Drawing, Findings, Measured, Picture, Section, Table, plural
from jebm.report.plots import COLOURS, svg_of, text_of

__all__ = ["side_by_side"]

_FIRST = ("distortion", "loss", "f_posterior", "f_prior")
"""Metrics drawn before all others; evaluations follow, then rates."""
_DRAWN = ("evaluation/", "rate/", "chain/")
_MOST_POINTS = 400  # of a line: more cannot be seen
_SHEET = "data with reconstructions, samples of the prior, one layer varied at a time"
_WHERE = ("where", "start")


def side_by_side(traces: Sequence[Trace]) -> Findings:
    """Return the findings of two or more runs beside each other."""
    states = ", ".join(f"{trace.name} {trace.status.state} at step {trace.status.step:,}" for trace in traces)
    return Findings(
        title=f"Runs compared: {', '.join(trace.name for trace in traces)}",
        lead=(f"{states}.", "Lines and columns are in the order in which the runs were named."),
        provenance={trace.name: trace.store.uri for trace in traces},
        config=dict(traces[0].config),
        sections=tuple(
            section
            for section in (
                _pictures(traces),
                _configs(traces),
                _curves(traces),
                *_numbers(traces),
                _seeds(traces),
            )
            if section is not None
        ),
    )


def _pictures(traces: Sequence[Trace]) -> Section:
    """Return the sheets of the last step that all runs have drawn, or else each run's last."""
    common = set.intersection(*({*trace.pictures} for trace in traces))
    found, missing = [], []
    for number, trace in enumerate(traces):
        step = max(common or trace.pictures, default=None)
        png = None if step is None else picture_of(trace, step)
        if step is None or png is None:
            missing.append(trace.name)
            continue
        meaning = f"After step {step:,}: {_SHEET}."
        found.append(Picture(trace.name, f"run-{number}.png", png, meaning, cover=True))
    step_text = f"All of step {max(common):,}." if common else "Of each run's last step; no step is in all."
    return Section(
        "pictures",
        "Pictures",
        f"The sheets above. {step_text}",
        pictures=tuple(found),
        warnings=(f"no picture of {', '.join(missing)}",) if missing else (),
    )


def _configs(traces: Sequence[Trace]) -> Section:
    """Return the keys that differ: first those that affect the result, then where and how the runs ran."""
    keys = list(dict.fromkeys(key for trace in traces for key in trace.config))
    differing = [key for key in keys if len({_plain(trace.config, key) for trace in traces}) > 1]
    groups = (
        ("Keys that affect the result", [key for key in differing if role_of(key) not in _WHERE]),
        ("Where and how they ran", [key for key in differing if role_of(key) in _WHERE]),
    )
    tables = tuple(
        Table(
            title,
            ("key", *(trace.name for trace in traces)),
            tuple((key, *(_plain(trace.config, key) for trace in traces)) for key in some),
            f"{plural(len(some), 'key')} of {len(keys):,}.",
        )
        for title, some in groups
        if some
    )
    notes = () if groups[0][1] else ("No key that affects the result differs.",)
    return Section("config", "What differs", "The configs, key by key.", tables=tables, notes=notes)


def _plain(config: Mapping[str, object], key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False) if key in config else NONE


def _curves(traces: Sequence[Trace]) -> Section:
    """Return a drawing of each metric with a line for each run, over images seen."""
    names = {name for trace in traces for _, row in trace.rows for name in row}
    others = [name for prefix in _DRAWN for name in sorted(names) if name.startswith(prefix)]
    drawings = []
    for name in [*(name for name in _FIRST if name in names), *others]:
        lines = {trace.name: _line(trace, name) for trace in traces}
        if max(map(len, lines.values())) > 1:
            measure = of_metric(name)
            meaning = measure.filled().meaning if measure else "As reported while training."
            drawings.append(Drawing(name, svg_of(_drawn(name, lines), width=6.4, height=2.9), meaning))
    return Section(
        "curves",
        "Curves",
        "Over images seen, so that batches of different sizes can be compared; one colour for each run.",
        drawings=tuple(drawings),
        warnings=() if drawings else ("no run has two reports of one metric",),
    )


def _line(trace: Trace, name: str) -> list[tuple[float, float]]:
    """Return (images, value), as means over neighbours if there are too many points."""
    points = [
        (float(step) * trace.batch_size, row[name])
        for step, row in trace.rows
        if name in row and math.isfinite(row[name])
    ]
    every = max(1, math.ceil(len(points) / _MOST_POINTS))
    pieces = [points[start : start + every] for start in range(0, len(points), every)]
    return [(piece[-1][0], math.fsum(value for _, value in piece) / len(piece)) for piece in pieces]


def _drawn(name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Callable[[Canvas], None]:
    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for index, (run, line) in enumerate(lines.items()):
            axes.plot(
                [x for x, _ in line],
                [y for _, y in line],
                color=COLOURS[index % len(COLOURS)],
                linestyle="-" if index < len(COLOURS) else "--",
                marker="o" if len(line) <= 30 else "",
                markersize=3,
                linewidth=1.5,
                label=text_of(run),
            )
        axes.set_xlabel("images seen")
        axes.set_ylabel(text_of(name))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        canvas.legend(loc="outside upper left", ncols=min(3, len(lines)), fontsize=9)

    return draw


def _numbers(traces: Sequence[Trace]) -> list[Section]:
    """Return the newest evaluations beside each other, and the newest value of every metric."""
    columns = tuple(trace.name for trace in traces)
    figures = list(dict.fromkeys(key for trace in traces for key in trace.evaluation))
    rows: list[tuple[Cell, ...]] = []
    for key in figures:
        known = [trace.evaluation.get(key) for trace in traces]
        first = next(figure for figure in known if figure is not None)
        arrow = {"lower": " ↓", "higher": " ↑"}.get(first.better, "")
        cells = (None if figure is None else Measured(figure.value, figure.error) for figure in known)
        rows.append((key[0], f"{key[1]}{arrow}", first.unit, *cells))
    where = "; ".join(f"{trace.name}: {trace.evaluation_key or 'none'}" for trace in traces)
    evaluations = Table("Figures", ("section", "figure", "unit", *columns), tuple(rows), f"Of {where}.")
    metrics = list(dict.fromkeys(name for trace in traces for name in trace.metrics))
    last = Table(
        "Newest values",
        ("metric", *columns),
        tuple((name, *(trace.metrics.get(name) for trace in traces)) for name in metrics),
        "The last report in which the metric stands.",
    )
    return [
        Section(
            "evaluations",
            "Evaluations",
            "The newest report of `jebm evaluate` of each run: value ± standard error of its model's figure, "
            "which does not cover what another seed of training would change.",
            tables=(evaluations,) if rows else (),
            warnings=() if rows else ("no run has been evaluated; jebm evaluate --checkpoint RUN does it",),
        ),
        Section("metrics", "Training", "What the runs last reported while training.", tables=(last,)),
    ]


def _seeds(traces: Sequence[Trace]) -> Section | None:
    """Return intervals over runs that differ only by their seed; None if there are no such runs."""
    groups: dict[str, list[Trace]] = defaultdict(list)
    for trace in traces:
        shaping = {k: v for k, v in trace.config.items() if role_of(k) not in _WHERE and k != "run.seed"}
        groups[json.dumps(shaping, sort_keys=True)].append(trace)
    several = [group for group in groups.values() if len({_plain(t.config, "run.seed") for t in group}) > 1]
    if not several:
        return None
    names = list(dict.fromkeys(name for trace in traces for name in trace.metrics))
    wanted = [name for name in names if name in _FIRST or name.startswith("evaluation/")]
    rows = []
    for name in wanted:
        cells: list[Cell] = []
        for group in several:
            values = [
                trace.metrics[name] for trace in group if math.isfinite(trace.metrics.get(name, math.nan))
            ]
            interval = t_interval(values) if len(values) > 1 else None
            cells.append(None if interval is None else Measured(interval.mean, interval.half_width))
        rows.append((name, *cells))
    table = Table(
        "Means over seeds",
        ("metric", *(" + ".join(trace.name for trace in group) for group in several)),
        tuple(rows),
        "Mean of the runs' newest values ± half of its 95 % t-interval. Intervals that overlap prove nothing "
        "either way: `jebm compare` pairs runs by seed and tests differences.",
    )
    return Section("seeds", "Seeds", "Runs whose configs differ only in run.seed, together.", tables=(table,))
