"""A sweep's findings: the answer, which keys mattered, how certain that is, and all trials."""

import re
import statistics
from collections.abc import Sequence
from typing import Literal

from jebm.config import leaves
from jebm.report.catalogue import of_metric
from jebm.report.findings import (
    Cell,
    Figure,
    Findings,
    Listing,
    Picture,
    Section,
    Table,
    duration,
    number,
    plural,
    yaml_text,
)
from jebm.store.storage import Store
from jebm.sweep.dimensions import Value, position, searched, setting
from jebm.sweep.drawings import draw
from jebm.sweep.importances import Importance, find_importances, what_mattered
from jebm.sweep.judge import concerns, confidence
from jebm.sweep.results import STATUSES, Sweep, Trial

__all__ = ["sweep_findings"]

_COMMAND = "jebm train --config best.yaml"
_PNG = b"\x89PNG\r\n\x1a\n"


def sweep_findings(sweep: Sweep, folder: Store) -> Findings:
    """Return a sweep's findings; pictures come from the trials' runs in its `folder`.

    Raises:
        StoreError: the store cannot be read.
    """
    importances = find_importances(sweep)
    keys = _keys(sweep, importances)
    # The most important keys first, in all tables.
    sections = [
        _answer(sweep, importances, keys, _pictures(folder, sweep)),
        _plots(sweep, importances),
        _trials(sweep, keys),
        _cost(sweep),
        Section(
            "search",
            "The search",
            "What the sweep was asked for.",
            listings=(Listing("The search", yaml_text(sweep.search)),),
        ),
    ]
    return Findings(
        title=f"Sweep {sweep.name}",
        lead=_lead(sweep),
        provenance={key: setting(fact) for key, fact in leaves(sweep.provenance)},
        config=sweep.config,
        sections=tuple(sections),
    )


def _lead(sweep: Sweep) -> tuple[str, ...]:
    goals = " and ".join(f"{objective.direction} {objective.metric}" for objective in sweep.objectives)
    times = ""
    if sweep.started and sweep.ended:
        span = max(0.0, (sweep.ended - sweep.started).total_seconds())
        times = f", begun {sweep.started:%Y-%m-%d %H:%M}, {duration(span)} from first start to last end"
    running = len(sweep.having("running", "waiting"))
    still = f"; {running} still running or waiting" if running else ""
    trials = f"{plural(len(sweep.trials), 'trial')} over {plural(len(sweep.space), 'key')}{times}{still}."
    data, latents = (dict(leaves(sweep.config)).get(key, "") for key in ("data.train", "model.latent_dims"))
    base = f"Base config: latents {setting(latents)} on {setting(data)}." if data and latents else ""
    return tuple(filter(None, (f"Goal: {goals}.", trials, base)))


# ── The answer ──────────────────────────────────────────────────────────────────────────────────────────


def _answer(
    sweep: Sweep, importances: Sequence[Importance], keys: Sequence[str], pictures: tuple[Picture, ...]
) -> Section:
    best = sweep.best()
    tables: list[Table] = []
    if best is not None:
        tables.append(_settings(sweep, importances, keys, best))
    if len(leaders := sweep.leaders()) > 1:
        front = "The Pareto front" if len(sweep.objectives) > 1 else f"The top {len(leaders)}"
        tables.append(Table(front, *_trial_table(sweep, keys, leaders), "The best trials, side by side."))
    train = "Train it at full length, with the best.yaml that comes with this page"
    return Section(
        "answer",
        "The answer",
        _headline(sweep),
        figures=_figures(sweep, best),
        tables=tuple(tables),
        pictures=pictures,
        notes=(what_mattered(sweep, importances), *confidence(sweep)),
        listings=() if best is None else (Listing(train, _COMMAND),),
        warnings=tuple(concerns(sweep, importances)),
    )


def _headline(sweep: Sweep) -> str:
    best, objective = sweep.best(), sweep.objectives[0]
    if best is None:
        if not sweep.having("running", "waiting"):
            return "No answer: no trial has finished, and none is running."
        reported = sum(trial.last is not None for trial in sweep.having("running"))
        return f"No answer yet: no trial has finished; {reported} of those that run reported already."
    if len(sweep.objectives) > 1:
        return (
            f"{plural(len(sweep.front()), 'trial')} on the front: no finished trial beats one of these in "
            f"every objective. best.yaml holds {best.name}, the best of them by {objective.metric}; to train "
            "another one, put its values in."
        )
    finished = sweep.ranking()
    lowest = "lowest" if objective.direction == "minimize" else "highest"
    middle = statistics.median(trial.values[0] for trial in finished)
    against = f"; their median is {number(middle)}" if len(finished) > 2 else ""
    return (
        f"{number(best.values[0])} {objective.metric} of trial {best.name}, the {lowest} of "
        f"{plural(len(finished), 'finished trial')}{against}."
    )


def _figures(sweep: Sweep, best: Trial | None) -> tuple[Figure, ...]:
    if best is None:
        return ()
    figures = []
    for objective, value in zip(sweep.objectives, best.values, strict=True):
        known = of_metric(objective.metric)
        better: Literal["lower", "higher"] = "lower" if objective.direction == "minimize" else "higher"
        meaning = f"{known.title}: {known.meaning} " if known else ""
        meaning += f"Of trial {best.name}, after {best.images:,} images."
        figures.append(Figure(objective.metric, value, None, known.unit if known else "", better, meaning))
    return tuple(figures)


def _settings(sweep: Sweep, importances: Sequence[Importance], keys: Sequence[str], best: Trial) -> Table:
    """Return the best values, with their place in the searched range and their importance."""
    base = dict(leaves(sweep.config))
    by_key = {item.key: item for item in importances}
    rows: list[tuple[Cell, ...]] = []
    for key in keys:
        place = position(sweep.space[key], best.params[key]) if key in best.params else None
        rows.append(
            (
                key,
                setting(best.params[key]) if key in best.params else "",
                setting(base[key]) if key in base else "",
                "" if place is None else f"{place:.0%}",
                searched(sweep.space[key]),
                *([_importance(by_key.get(key))] if importances else []),
            )
        )
    # Importances get a column only if there are enough trials.
    columns: tuple[str, ...] = ("key", "best", "base config", "place in its range", "searched")
    meaning = f"The values of {best.name}, and where they lie between the ends of what was searched."
    if importances:
        columns += ("importance",)
        meaning += (
            " Importance: how much the key decides whether a trial ends in the better half (PED-ANOVA on "
            "ranks), and in parentheses how far shuffled rankings get: below it, it is chance."
        )
    return Table("The best values", columns, tuple(rows), meaning)


def _importance(item: Importance | None) -> str:
    return "" if item is None else f"{item.share:.0%} ({item.chance:.0%})"


def _keys(sweep: Sweep, importances: Sequence[Importance]) -> list[str]:
    """Return the searched keys, most important first."""
    order = {item.key: place for place, item in enumerate(importances)}
    return sorted(sweep.space, key=lambda key: order.get(key, len(order)))


def _pictures(folder: Store, sweep: Sweep) -> tuple[Picture, ...]:
    """Return the last picture sheets of the best and the worst finished trial, if they are PNGs."""
    ranking = sweep.ranking()
    wanted = [("best", "The best", ranking[0])] if ranking else []
    if len(ranking) > 1:
        wanted.append(("worst", "The worst finished", ranking[-1]))
    found = []
    for name, title, trial in wanted:
        sheets = sorted(
            info.key
            for info in folder.list(f"trials/{trial.same_as or trial.name}/pictures/")
            if re.fullmatch(r"step-\d+\.png", info.key.rpartition("/")[2], re.ASCII)
        )
        png = folder.get(sheets[-1]) if sheets else b""
        if png.startswith(_PNG):
            step = int(re.findall(r"\d+", sheets[-1])[-1])
            meaning = (
                f"Trial {trial.name} after {step:,} steps, {number(trial.values[0])}: data with "
                "reconstructions, samples of the prior, and hierarchical samples for each latent layer. If "
                "you cannot tell best and worst apart, the objective does not measure what you see."
            )
            found.append(Picture(f"{title}: {trial.name}", f"{name}.png", png, meaning, cover=True))
    return tuple(found)


# ── All trials, and what they cost ──────────────────────────────────────────────────────────────────────


def _plots(sweep: Sweep, importances: Sequence[Importance]) -> Section:
    meaning = "How the trials went, and what the searched keys did."
    return Section("plots", "Plots", meaning, drawings=tuple(draw(sweep, importances)))


def _trials(sweep: Sweep, keys: Sequence[str]) -> Section:
    errors = tuple(f"{trial.name}: {trial.error}" for trial in sweep.trials if trial.error)
    meaning = "In parentheses: the last report of a trial that did not finish."
    table = Table("Trials", *_trial_table(sweep, keys, sweep.trials), meaning)
    copies = sum(bool(trial.same_as) for trial in sweep.trials)
    not_run = f", {copies} of them not run again: each has the result of its twin" if copies else ""
    count = f"{plural(len(sweep.trials), 'trial')}{not_run}."
    return Section("trials", "All trials", count, tables=(table,), notes=errors)


def _trial_table(
    sweep: Sweep, keys: Sequence[str], trials: Sequence[Trial]
) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    metrics = [objective.metric for objective in sweep.objectives]
    head = ("trial", *metrics, *keys, "status", "images", "time", "attempts")
    return head, tuple(_trial_row(sweep, keys, trial) for trial in trials)


def _trial_row(sweep: Sweep, keys: Sequence[str], trial: Trial) -> tuple[Cell, ...]:
    results: list[Cell] = list(trial.values)
    if not results:
        last = None if trial.last is None else f"({number(trial.last)})"
        results = [last, *[None] * (len(sweep.objectives) - 1)]
    return (
        trial.name,
        *results,
        *(_setting(trial.params[key]) if key in trial.params else None for key in keys),
        f"{trial.status}, as {trial.same_as}" if trial.same_as else trial.status,
        trial.images,
        duration(trial.seconds),
        trial.attempts,
    )


def _setting(value: Value) -> Cell:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain else setting(value)


def _cost(sweep: Sweep) -> Section:
    total = sum(trial.seconds for trial in sweep.trials)
    rows: list[tuple[Cell, ...]] = []
    for label, statuses in [*((status, (status,)) for status in STATUSES), ("all", STATUSES)]:
        if trials := sweep.having(*statuses):
            seconds = sum(trial.seconds for trial in trials)
            share = f"{seconds / total:.0%}" if total else ""
            images = sum(trial.images for trial in trials if not trial.same_as)
            rows.append((label, len(trials), duration(seconds), share, images))
    table = Table(
        "Training time",
        ("status", "trials", "time", "share", "images"),
        tuple(rows),
        "Over all attempts, by how the trial ended.",
    )
    return Section("cost", "Cost", _cost_in_words(sweep, total), tables=(table,))


def _cost_in_words(sweep: Sweep, total: float) -> str:
    if not total:
        return "No training time has been recorded yet."
    lost = sum(trial.seconds for trial in sweep.having("pruned", "diverged"))
    full = max((trial.images for trial in sweep.having("finished")), default=0)
    saved = sum(
        trial.seconds / trial.images * max(0, full - trial.images)
        for trial in sweep.having("pruned")
        if trial.images
    )
    return (
        f"The trials trained for {duration(total)} in all; {lost / total:.0%} of it went into trials that "
        "were pruned or diverged." + (f" Pruning saved about {duration(saved)} more." if saved else "")
    )
