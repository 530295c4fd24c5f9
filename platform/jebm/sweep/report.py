"""The report of a sweep: one HTML page that opens offline, the same as Markdown, and the best config.

The page loads nothing: style, scripts, figures and pictures are in it, and its content security policy
forbids the rest. Every text of the sweep is escaped, since it may come from a bucket.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from plotly.offline import get_plotlyjs
from torch.utils.tensorboard import SummaryWriter

from jebm.config import leaves
from jebm.errors import ConfigError, StoreError
from jebm.parser import config_from_dict, config_to_yaml
from jebm.store.storage import Store
from jebm.sweep.figures import Figure, draw
from jebm.sweep.results import (
    STATUSES,
    Importance,
    Sweep,
    Trial,
    concerns,
    confidence,
    find_importances,
    number,
    plural,
    position,
    read_sweep,
    searched,
    setting,
    what_mattered,
)
from jebm.sweep.space import with_parameters

__all__ = ["make_report", "write_tensorboard"]

_COMMAND = "python jobs/train.py --config best.yaml"
_PNG = b"\x89PNG\r\n\x1a\n"
_LONGEST_NAME = 100  # of a run


def make_report(folder: Store, output: Path) -> Path:
    """Write report.html, report.md and, once a trial has finished, best.yaml; return the path of the first.

    `folder` is the sweep's; the sweep may still be running. The same sweep gives the same bytes.

    Raises:
        CheckpointError: there is no sweep, or it cannot be read.
        ConfigError: its base config is not one of this version.
        StoreError: the store cannot be read, or `output` cannot be written.
    """
    sweep = read_sweep(folder)
    importances = find_importances(sweep)
    best = sweep.best()
    files = {
        "best.yaml": None if best is None else _best_config(sweep, best),
        "report.md": _markdown(sweep, importances),
        "report.html": _page(sweep, importances, _pictures(folder, sweep)),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if content is None:
                (output / name).unlink(missing_ok=True)  # of another sweep, or of what this one was before
            else:
                (output / name).write_text(content, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise StoreError(f"{output}: cannot write the report: {error.strerror or error}") from error
    return output / "report.html"


def write_tensorboard(folder: Store, output: Path) -> Path:
    """Write the searched values and the results of all trials into `output`/tensorboard, and return it.

    Its HPARAMS page then compares them. Events of an earlier call are replaced.
    """
    sweep = read_sweep(folder)
    board = output / "tensorboard"
    try:
        for trial in sweep.trials:
            place = board / trial.name
            for old in place.glob("events.out.tfevents.*"):
                old.unlink()
            values = {
                key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
                for key, value in trial.params.items()
            }
            metrics = {"images": float(trial.images), "seconds": trial.seconds}
            for objective, value in zip(sweep.objectives, trial.values, strict=False):
                metrics[objective.metric] = value
            with SummaryWriter(str(place)) as writer:
                writer.add_hparams({**values, "status": trial.status}, metrics, run_name=".")
    except OSError as error:
        raise StoreError(f"{board}: cannot write: {error.strerror or error}") from error
    return board


# ── What both forms say ─────────────────────────────────────────────────────────────────────────────────


def _best_config(sweep: Sweep, best: Trial) -> str:
    """Return the base config with the best trial's values, as YAML for --config; its run has a new name."""
    name = f"{sweep.name[: _LONGEST_NAME - 5]}-best"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        name = "best"
    try:
        config = with_parameters(config_from_dict(sweep.config), best.params, name=name)
    except ConfigError as error:
        raise ConfigError(f"sweep.json: its config is none of this version: {error}") from error
    results = ", ".join(f"{o.metric} {number(v)}" for o, v in zip(sweep.objectives, best.values, strict=True))
    comment = f"Trial {best.name} of sweep {sweep.name}: {results} after {best.images:,} images."
    return f"# {' '.join(comment.split())}\n{config_to_yaml(config)}"


def _subtitle(sweep: Sweep) -> str:
    goals = " and ".join(f"{objective.direction} {objective.metric}" for objective in sweep.objectives)
    times = ""
    if sweep.started and sweep.ended:
        span = max(0.0, (sweep.ended - sweep.started).total_seconds())
        times = f", begun {sweep.started:%Y-%m-%d %H:%M}, {_duration(span)} from first start to last end"
    running = len(sweep.having("running", "waiting"))
    still = f"; {running} still going" if running else ""
    return (
        f"Goal: {goals}. {plural(len(sweep.trials), 'trial')} over {plural(len(sweep.space), 'key')}"
        f"{times}{still}."
    )


def _headline(sweep: Sweep) -> tuple[str, str]:
    """Return the answer as a number, or a few words, and the sentence that goes with it."""
    best, objective = sweep.best(), sweep.objectives[0]
    if best is None:
        if not sweep.having("running", "waiting"):
            return "No answer", "No trial has finished, and none is running."
        reported = sum(trial.last is not None for trial in sweep.having("running"))
        return "No answer yet", f"No trial has finished; {reported} of those that run reported already."
    if len(sweep.objectives) > 1:
        front = sweep.front()
        return f"{plural(len(front), 'trial')} on the front", (
            f"No finished trial beats one of these in every objective. best.yaml holds "
            f"{best.name}, the best of them by {objective.metric}; for another one put its values in."
        )
    finished = sweep.ranking()
    lowest = "lowest" if objective.direction == "minimize" else "highest"
    middle = statistics.median(trial.values[0] for trial in finished)
    against = f"; their median is {number(middle)}" if len(finished) > 2 else ""
    return number(best.values[0]), (
        f"{objective.metric} of trial {best.name}, the {lowest} of {plural(len(finished), 'finished trial')}"
        f"{against}."
    )


@dataclass(frozen=True)
class _Row:
    """A searched key in the table of the answer."""

    key: str
    best: str
    base: str
    searched: str
    importance: Importance | None


def _answer_rows(sweep: Sweep, importances: Sequence[Importance], best: Trial) -> list[_Row]:
    base = dict(leaves(sweep.config))
    by_key = {item.key: item for item in importances}
    return [
        _Row(
            key,
            setting(best.params[key]) if key in best.params else "",
            setting(base[key]) if key in base else "",
            searched(sweep.space[key]),
            by_key.get(key),
        )
        for key in _keys(sweep, importances)
    ]


def _importance(item: Importance | None) -> str:
    if item is None:
        return ""
    return f"{item.share:.0%}" + ("" if item.significant else " (chance)")


def _leading(sweep: Sweep) -> str:
    return "The Pareto front" if len(sweep.objectives) > 1 else f"The top {len(sweep.leaders())}"


def _keys(sweep: Sweep, importances: Sequence[Importance]) -> list[str]:
    """Return the searched keys, the important ones first."""
    order = {item.key: place for place, item in enumerate(importances)}
    return sorted(sweep.space, key=lambda key: order.get(key, len(order)))


def _trial_head(sweep: Sweep, keys: Sequence[str]) -> list[str]:
    metrics = [objective.metric for objective in sweep.objectives]
    return ["trial", *metrics, *keys, "status", "images", "time", "attempts"]


def _trial_cells(sweep: Sweep, keys: Sequence[str], trial: Trial) -> list[tuple[str, float | str]]:
    """Return (text, what to sort by) for each column."""
    results: list[tuple[str, float | str]]
    if trial.values:
        results = [(number(value), value) for value in trial.values]
    else:
        last = ("", "") if trial.last is None else (f"({number(trial.last)})", trial.last)
        results = [last, *[("", "")] * (len(sweep.objectives) - 1)]
    params: list[tuple[str, float | str]] = []
    for key in keys:
        value = trial.params.get(key, "")
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        params.append((setting(value), value if plain else setting(value)))
    return [
        (trial.name, trial.number),
        *results,
        *params,
        (trial.status, STATUSES.index(trial.status)),
        (f"{trial.images:,}", trial.images),
        (_duration(trial.seconds), trial.seconds),
        (str(trial.attempts), trial.attempts),
    ]


def _cost_rows(sweep: Sweep) -> list[tuple[str, str, str, str, str]]:
    total = sum(trial.seconds for trial in sweep.trials)
    rows = []
    for label, statuses in [*((status, (status,)) for status in STATUSES), ("all", STATUSES)]:
        trials = sweep.having(*statuses)
        if trials:
            seconds = sum(trial.seconds for trial in trials)
            images = sum(trial.images for trial in trials)
            share = f"{seconds / total:.0%}" if total else ""
            rows.append((label, str(len(trials)), _duration(seconds), share, f"{images:,}"))
    return rows


def _cost(sweep: Sweep) -> str:
    total = sum(trial.seconds for trial in sweep.trials)
    if not total:
        return "No training time has been recorded yet."
    lost = sum(trial.seconds for trial in sweep.having("pruned", "diverged"))
    said = (
        f"The trials trained for {_duration(total)} in all; {lost / total:.0%} of it went into trials that "
        f"were pruned or diverged."
    )
    full = max((trial.images for trial in sweep.having("finished")), default=0)
    saved = sum(
        trial.seconds / trial.images * max(0, full - trial.images)
        for trial in sweep.having("pruned")
        if trial.images
    )
    return said + (f" Pruning saved about {_duration(saved)} more." if saved else "")


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _dump(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return text


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Picture:
    trial: Trial
    title: str
    alt: str
    data: bytes


def _pictures(folder: Store, sweep: Sweep) -> list[_Picture]:
    """Return the last sheets of the best and of the worst finished trial, as far as they are PNGs."""
    ranking = sweep.ranking()
    wanted = [("The best", ranking[0])] if ranking else []
    if len(ranking) > 1:
        wanted.append(("The worst finished", ranking[-1]))
    found = []
    for title, trial in wanted:
        sheets = sorted(
            info.key
            for info in folder.list(f"trials/{trial.name}/pictures/")
            if re.fullmatch(r"step-\d+\.png", info.key.rpartition("/")[2])
        )
        data = folder.get(sheets[-1]) if sheets else b""
        if data.startswith(_PNG):
            step = int(re.findall(r"\d+", sheets[-1])[-1])
            alt = (
                f"Images of trial {trial.name} after {step:,} steps: data with reconstructions, samples of "
                f"the prior, and hierarchical samples for each latent layer"
            )
            found.append(_Picture(trial, title, alt, data))
    return found


# ── Markdown ────────────────────────────────────────────────────────────────────────────────────────────


def _markdown(sweep: Sweep, importances: Sequence[Importance]) -> str:
    best = sweep.best()
    value, sentence = _headline(sweep)
    blocks = [f"# Sweep {_plain(sweep.name)}", _plain(_subtitle(sweep)), "## The answer"]
    blocks.append(f"**{_plain(value)}** {_plain(sentence)}")
    if best is not None:
        blocks.append(f"Train it at full length:\n\n```bash\n{_COMMAND}\n```")
        rows = [
            [row.key, row.best, row.base, row.searched, _importance(row.importance)]
            for row in _answer_rows(sweep, importances, best)
        ]
        blocks.append(_grid(["key", "best", "base config", "searched", "importance"], rows))
    if minded := concerns(sweep, importances):
        blocks += ["## What to mind", _bullets(minded)]
    blocks += ["## What mattered", _plain(what_mattered(sweep, importances))]
    blocks += ["## How sure", _bullets(confidence(sweep))]
    keys = _keys(sweep, importances)
    for heading, trials in ((_leading(sweep), sweep.leaders()), ("All trials", sweep.trials)):
        if len(trials) > (trials is not sweep.trials):
            cells = [[text for text, _ in _trial_cells(sweep, keys, trial)] for trial in trials]
            blocks += [f"## {heading}", _grid(_trial_head(sweep, keys), cells)]
    if errors := [f"{trial.name}: {trial.error}" for trial in sweep.trials if trial.error]:
        blocks += ["## Errors", _bullets(errors)]
    blocks += ["## Cost", _plain(_cost(sweep)), _grid(_COST_HEAD, _cost_rows(sweep))]
    facts = [f"{key}: {setting(fact)}" for key, fact in leaves(sweep.provenance)]
    blocks += ["## Provenance", _bullets(facts), "The search:", _indented(_dump(sweep.search))]
    blocks += ["The base config:", _indented(_dump(sweep.config))]
    return "\n\n".join(block for block in blocks if block) + "\n"


_COST_HEAD = ["status", "trials", "time", "share", "images"]


def _plain(text: str) -> str:
    """Return text in which Markdown finds no markup."""
    return re.sub(r"([\\`*_{}\[\]#|~!$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell if i == 1 else _plain(cell) for cell in row) + " |"
        for i, row in enumerate(lines)
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


# ── HTML ────────────────────────────────────────────────────────────────────────────────────────────────


def _page(sweep: Sweep, importances: Sequence[Importance], pictures: Sequence[_Picture]) -> str:
    figures = [figure for figure in draw(sweep, importances) if figure.data]
    drawn = {figure.name: {"data": figure.data, "layout": figure.layout} for figure in figures}
    # Inside a script element only "<" could end it, and JSON may spell it otherwise.
    payload = json.dumps(drawn, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    scripts = [get_plotlyjs().replace("</script", "<\\/script"), _resource("report.js")]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"base-uri 'none'; form-action 'none'"
    )
    sections = [
        _answer(sweep, importances),
        *(_figure(figure) for figure in figures),
        _trials(sweep, _keys(sweep, importances)),
        _gallery(pictures),
        _costs(sweep),
        _provenance(sweep),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_e(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>Sweep {_e(sweep.name)}</title>",
            f"<style>\n{_resource('report.css')}</style>",
            "</head>",
            "<body>",
            f"<header>\n<h1>Sweep {_e(sweep.name)}</h1>\n<p>{_e(_subtitle(sweep))}</p>",
            _contents(figures, pictures),
            "</header>",
            "<main>",
            *sections,
            "</main>",
            f'<script type="application/json" id="figures">{payload}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _resource(name: str) -> str:
    return importlib.resources.files("jebm.sweep").joinpath(name).read_text(encoding="utf-8")


def _e(text: object) -> str:
    return html.escape(str(text))


def _contents(figures: Sequence[Figure], pictures: Sequence[_Picture]) -> str:
    links = [("answer", "The answer"), *((figure.name, figure.title) for figure in figures)]
    links += [("trials", "All trials"), *([("pictures", "Pictures")] if pictures else [])]
    links += [("cost", "Cost"), ("provenance", "Provenance")]
    items = "".join(f'<li><a href="#{name}">{_e(title)}</a></li>' for name, title in links)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _answer(sweep: Sweep, importances: Sequence[Importance]) -> str:
    best = sweep.best()
    value, sentence = _headline(sweep)
    parts = [
        '<section id="answer">',
        "<h2>The answer</h2>",
        f'<p class="headline"><strong>{_e(value)}</strong> <span>{_e(sentence)}</span></p>',
    ]
    if best is not None:
        parts += [
            "<p>Train it at full length, with the best.yaml that comes with this page:</p>",
            f"<pre><code>{_COMMAND}</code></pre>",
            _settings(sweep, importances, best),
        ]
    if minded := concerns(sweep, importances):
        parts.append(f'<div class="minded"><h3>What to mind</h3>{_list(minded)}</div>')
    parts += [
        f"<h3>What mattered</h3>\n<p>{_e(what_mattered(sweep, importances))}</p>",
        f"<h3>How sure</h3>\n{_list(confidence(sweep))}",
    ]
    if len(leaders := sweep.leaders()) > 1:
        keys = _keys(sweep, importances)
        rows = [_trial_cells(sweep, keys, trial) for trial in leaders]
        parts.append(_table(_leading(sweep), _trial_head(sweep, keys), rows))
    return "\n".join([*parts, "</section>"])


def _settings(sweep: Sweep, importances: Sequence[Importance], best: Trial) -> str:
    """Return the table of the best values, with where they lie in their range and how much they matter."""
    rows = ""
    for row in _answer_rows(sweep, importances, best):
        others = [trial for trial in sweep.leaders() if trial is not best]
        places = [_place(sweep, row.key, trial) for trial in [*others, best]]
        changed = " changed" if row.best != row.base else ""
        rows += (
            f'<tr><th scope="row"><code>{_e(row.key)}</code></th><td class="n{changed}">{_e(row.best)}</td>'
            f'<td class="n">{_e(row.base)}</td><td>{_range_bar(places)}</td><td>{_e(row.searched)}</td>'
            f"{_importance_cell(row.importance)}</tr>"
        )
    caption = (
        f"The values of {best.name}; bold where they differ from the base config. Dot: their place in the "
        f"searched range; rings: the other leading trials."
    )
    titles = ["key", "best", "base config", "place in its range", "searched"]
    if importances:
        titles.append("importance")
        caption += (
            " Importance: how much the key decides whether a trial ends in the better half (PED-ANOVA on "
            "ranks); the tick is as far as shuffled rankings get."
        )
    head = "".join(
        f'<th scope="col"{" class=n" if title in ("best", "base config") else ""}>{title}</th>'
        for title in titles
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _place(sweep: Sweep, key: str, trial: Trial) -> float | None:
    return position(sweep.space[key], trial.params[key]) if key in trial.params else None


def _range_bar(places: Sequence[float | None]) -> str:
    """Return a line from end to end of a range with a ring at each place, and a dot at the last one."""
    if places[-1] is None:
        return ""
    rings = "".join(f'<circle cx="{8 + 134 * p:.1f}" cy="9" r="4"/>' for p in places[:-1] if p is not None)
    label = f"at {places[-1]:.0%} of the range"
    return (
        f'<svg class="range" width="150" height="18" viewBox="0 0 150 18" role="img" aria-label="{label}">'
        f'<path d="M8 9H142M8 4v10M142 4v10"/>{rings}'
        f'<circle class="best" cx="{8 + 134 * places[-1]:.1f}" cy="9" r="5.5"/></svg>'
    )


def _importance_cell(item: Importance | None) -> str:
    if item is None:
        return ""
    kind = "bar" if item.significant else "bar faint"
    return (
        f'<td><svg class="{kind}" width="110" height="18" viewBox="0 0 110 18" aria-hidden="true">'
        f'<rect x="0" y="4" width="{max(1.0, 108 * item.share):.1f}" height="10"/>'
        f'<path d="M{108 * min(1.0, item.chance) + 1:.1f} 1v16"/></svg> {_e(_importance(item))}</td>'
    )


def _figure(figure: Figure) -> str:
    alt = _e(f"{figure.title}. {figure.meaning}")
    return (
        f'<section id="{figure.name}"><h2>{_e(figure.title)}</h2>\n<figure><figcaption>{_e(figure.meaning)}'
        f'</figcaption><div class="plot" data-figure="{figure.name}" role="img" aria-label="{alt}" '
        f'style="height:{figure.height}px"><noscript>This figure needs JavaScript; its numbers are in the '
        f"table of all trials.</noscript></div></figure></section>"
    )


def _trials(sweep: Sweep, keys: Sequence[str]) -> str:
    rows = [_trial_cells(sweep, keys, trial) for trial in sweep.trials]
    errors = [f"{trial.name}: {trial.error}" for trial in sweep.trials if trial.error]
    return "\n".join(
        [
            '<section id="trials"><h2>All trials</h2>',
            _table(
                "Click a heading to sort. In parentheses: the last report of a trial that did not finish.",
                _trial_head(sweep, keys),
                rows,
                everything=True,
            ),
            f"<h3>What went wrong</h3>\n{_list(errors)}" if errors else "",
            "</section>",
        ]
    )


def _table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[tuple[str, float | str]]],
    *,
    everything: bool = False,
) -> str:
    lines = []
    for row in rows:
        cells = []
        for text, key in row:
            kind = ' class="n"' if _is_number(text) else ""
            cells.append(f'<td{kind} data-sort="{_e(key)}">{_badge(text)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    titles = ""
    for column, title in enumerate(head):
        kind = ' class="n"' if any(_is_number(row[column][0]) for row in rows) else ""
        label = f'<button type="button">{_e(title)}</button>' if everything else _e(title)
        titles += f'<th scope="col"{kind}>{label}</th>'
    return (
        f'<div class="scroll{" long" if everything else ""}"><table><caption>{_e(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _is_number(text: str) -> bool:
    return text[:1] in set("0123456789(-")


def _badge(text: str) -> str:
    return f'<span class="status {text}">{text}</span>' if text in STATUSES else _e(text)


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul>"


def _gallery(pictures: Sequence[_Picture]) -> str:
    if not pictures:
        return ""
    figures = "".join(
        f"<figure><figcaption>{_e(picture.title)}: {picture.trial.name}, "
        f"{_e(number(picture.trial.values[0]))}</figcaption>"
        f'<img alt="{_e(picture.alt)}" src="data:image/png;base64,{base64.b64encode(picture.data).decode()}">'
        f"</figure>"
        for picture in pictures
    )
    return (
        f'<section id="pictures"><h2>Pictures</h2><p>The last sheets of the best and of the worst finished '
        f"trial. If you cannot tell them apart, the objective does not measure what you see.</p>"
        f'<div class="gallery">{figures}</div></section>'
    )


def _costs(sweep: Sweep) -> str:
    rows = ""
    for label, *numbers in _cost_rows(sweep):
        cells = "".join(f'<td class="n">{_e(cell)}</td>' for cell in numbers)
        rows += f'<tr><th scope="row">{_badge(label)}</th>{cells}</tr>'
    head = "".join(f'<th scope="col">{_e(title)}</th>' for title in _COST_HEAD)
    return (
        f'<section id="cost"><h2>Cost</h2><p>{_e(_cost(sweep))}</p><div class="scroll"><table>'
        f"<caption>Training time over all attempts, by how the trial ended.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _provenance(sweep: Sweep) -> str:
    facts = "".join(
        f'<tr><th scope="row">{_e(key)}</th><td><code>{_e(setting(fact))}</code></td></tr>'
        for key, fact in leaves(sweep.provenance)
    )
    search, config = (f"<pre><code>{_e(_dump(part))}</code></pre>" for part in (sweep.search, sweep.config))
    return (
        f'<section id="provenance"><h2>Provenance</h2><div class="scroll"><table><caption>What the sweep was '
        f"made with.</caption><tbody>{facts}</tbody></table></div>"
        f"<details open><summary>The search</summary>{search}</details>"
        f"<details><summary>The base config</summary>{config}</details></section>"
    )
