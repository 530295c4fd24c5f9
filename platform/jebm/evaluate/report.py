"""The report of an evaluation: one HTML page that opens offline, the same as Markdown and as JSON.

The page loads nothing and runs no script: style, curves and pictures are in it, and its content security
policy forbids the rest. Every text of the findings is escaped, since it may come from a bucket.
"""

import base64
import hashlib
import html
import importlib.resources
import io
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from jebm.errors import CheckpointError
from jebm.evaluate.findings import Curve, Figure, Findings, Picture, Section, Table
from jebm.evaluate.plot import line_plot, number
from jebm.store.records import DamagedRecordError, read_object
from jebm.store.storage import Store

__all__ = ["KEY_FIGURES", "SCHEMA", "read_findings", "write_report"]

SCHEMA = 1
"""Version of evaluation.json."""

KEY_FIGURES = 2
"""How many figures of each section the summary shows: the first ones."""

_EVENTS = "tensorboard/events.out.tfevents.evaluation"
"""One name, so that a later report replaces its own events and no others."""

_DOCUMENT_BYTES = 256 * 2**20
_MOST_ROWS = 11  # of a curve in Markdown
_NONE = "–"  # noqa: RUF001  (what a table shows where there is no value)


def write_report(findings: Findings, output: Store) -> None:
    """Write evaluation.html, evaluation.md, evaluation.json, the pictures and the events for TensorBoard.

        evaluation.html   one page with everything in it
        evaluation.json   all but the pictures, for `read_findings`; numbers that are not finite are null
        pictures/         the PNGs
        tensorboard/      scalars evaluation/<section>/<figure> and the pictures, at provenance["step"]

    The summary shows the first `KEY_FIGURES` figures of each section. The same findings give the same bytes,
    but for TensorBoard's. The page is written last: where it is, the rest is as well.

    Raises:
        StoreError: the output cannot be written, or a picture's file name is none.
    """
    for section in findings.sections:
        for picture in section.pictures:
            output.put(f"pictures/{picture.file}", picture.png)
    output.put(_EVENTS, _events(findings))
    for name, text in (
        ("evaluation.json", _document(findings)),
        ("evaluation.md", _markdown(findings)),
        ("evaluation.html", _page(findings)),
    ):
        output.put(name, text.encode("utf-8", "backslashreplace"))


def read_findings(output: Store) -> Findings:
    """Return what evaluation.json of a report holds: the findings without their pictures.

    Numbers that were not finite are None in figures and tables, NaN in curves.

    Raises:
        ObjectMissingError: there is no report.
        CheckpointError: it is damaged, or of another version.
        StoreError: the store cannot be read.
    """
    place = f"{output.uri}/evaluation.json"
    try:
        document = read_object(output, "evaluation.json", _DOCUMENT_BYTES)
        schema = document["schema"]
        if schema == SCHEMA:
            return _findings(document)
    except DamagedRecordError as error:
        raise CheckpointError(f"{error}; evaluate again") from error
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: is damaged ({type(error).__name__}); evaluate again") from error
    raise CheckpointError(f"{place}: has schema {schema!r}, this version reads {SCHEMA}; evaluate again")


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────


def _document(findings: Findings) -> str:
    bare = replace(findings, sections=tuple(replace(section, pictures=()) for section in findings.sections))
    document = {"schema": SCHEMA, **asdict(bare)}
    for section, values in zip(findings.sections, document["sections"], strict=True):
        values["pictures"] = [
            {"title": picture.title, "file": f"pictures/{picture.file}", "meaning": picture.meaning}
            for picture in section.pictures
        ]
    return json.dumps(_strict(document), allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def _strict(value: object) -> object:
    """Return nested plain values as strict JSON can say them: None for each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _whole(value)
    if isinstance(value, Mapping):
        return {_whole(str(name)): _strict(item) for name, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def _whole(text: str) -> str:
    """Return a text without half characters, which strict JSON does not have: they are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _findings(document: Mapping[str, Any]) -> Findings:
    return Findings(
        provenance={name: _text(fact) for name, fact in document["provenance"].items()},
        config=dict(document["config"].items()),
        sections=tuple(_section(section) for section in document["sections"]),
    )


def _section(values: Mapping[str, Any]) -> Section:
    return Section(
        name=_text(values["name"]),
        title=_text(values["title"]),
        meaning=_text(values["meaning"]),
        seconds=float(values["seconds"]),
        figures=tuple(
            Figure(
                name=_text(figure["name"]),
                value=_number(figure["value"]),
                error=_number(figure["error"]),
                unit=_text(figure["unit"]),
                better=_direction(figure["better"]),
                meaning=_text(figure["meaning"]),
            )
            for figure in values["figures"]
        ),
        tables=tuple(
            Table(
                title=_text(table["title"]),
                columns=tuple(map(_text, table["columns"])),
                rows=tuple(tuple(map(_cell, row)) for row in table["rows"]),
                meaning=_text(table["meaning"]),
            )
            for table in values["tables"]
        ),
        curves=tuple(
            Curve(
                title=_text(curve["title"]),
                x_name=_text(curve["x_name"]),
                y_name=_text(curve["y_name"]),
                x=_numbers(curve["x"]),
                lines={name: _numbers(line) for name, line in curve["lines"].items()},
                meaning=_text(curve["meaning"]),
            )
            for curve in values["curves"]
        ),
        warnings=tuple(map(_text, values["warnings"])),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _cell(value: object) -> str | float | int | None:
    if isinstance(value, bool) or not isinstance(value, str | float | int | None):
        raise TypeError("not a cell")
    return value


def _number(value: object) -> float | None:
    cell = _cell(value)
    if isinstance(cell, str):
        raise TypeError("not a number")
    return None if cell is None else float(cell)


def _numbers(values: Sequence[object]) -> tuple[float, ...]:
    return tuple(math.nan if (value := _number(item)) is None else value for item in values)


def _direction(value: object) -> Literal["lower", "higher"] | None:
    if value not in ("lower", "higher", None):
        raise ValueError("not a direction")
    return value


# ── What all forms say ──────────────────────────────────────────────────────────────────────────────────


def _title(findings: Findings) -> str:
    step = findings.provenance.get("step", "")
    return f"Evaluation at step {int(step):,}" if step.isdecimal() else "Evaluation"


def _subtitle(findings: Findings) -> str:
    count = len(findings.sections)
    seconds = sum(section.seconds for section in findings.sections)
    return f"{count} measure{'' if count == 1 else 's'} in {_duration(seconds)}."


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.{0 if seconds >= 10 else 1}f} s"


def _key_figures(findings: Findings) -> list[tuple[Section, Figure]]:
    return [(section, figure) for section in findings.sections for figure in section.figures[:KEY_FIGURES]]


def _measured(figure: Figure) -> tuple[str, str]:
    """Return value and standard error, rounded to two digits of the error; an empty text for none."""
    value, error = figure.value, figure.error
    if value is None:
        return _NONE, ""
    if error is None or not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return number(value), "" if error is None else number(error)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 6 or abs(value) >= 1e12:  # too long to read
        return f"{value:.6g}", f"{error:.2g}"
    return f"{round(value, decimals) + 0.0:,.{decimals}f}", f"{error:,.{decimals}f}"  # no minus at zero


def _shown(cell: str | float | int | None) -> str:
    if cell is None:
        return _NONE
    return cell if isinstance(cell, str) else number(cell)


def _dump(values: Mapping[str, object]) -> str:
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return text


def _thinned(curve: Curve) -> Table:
    """Return a curve as a table of a few rows, the first and the last among them."""
    count = min(_MOST_ROWS, len(curve.x))
    kept = sorted({round(index * (len(curve.x) - 1) / max(1, count - 1)) for index in range(count)})
    rows = tuple((curve.x[i], *(line[i] for line in curve.lines.values())) for i in kept)
    return Table(curve.title, (curve.x_name, *curve.lines), rows, f"{curve.y_name}. {curve.meaning}")


# ── TensorBoard ─────────────────────────────────────────────────────────────────────────────────────────


def _events(findings: Findings) -> bytes:
    step = findings.provenance.get("step", "")
    at = int(step) if step.isdecimal() else 0
    with tempfile.TemporaryDirectory(prefix="jebm-") as folder:
        with SummaryWriter(folder) as writer:
            for section in findings.sections:
                for figure in section.figures:
                    if figure.value is not None and math.isfinite(figure.value):
                        writer.add_scalar(_tag(section, figure.name), figure.value, at)
                for picture in section.pictures:
                    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))
                    writer.add_image(_tag(section, picture.title), pixels, at, dataformats="HWC")
        (events,) = Path(folder).iterdir()
        return events.read_bytes()


def _tag(section: Section, name: str) -> str:
    return f"evaluation/{section.name}/{name}".encode("utf-8", "backslashreplace").decode()


# ── Markdown ────────────────────────────────────────────────────────────────────────────────────────────


def _markdown(findings: Findings) -> str:
    blocks = [f"# {_plain(_title(findings))}"]
    if checkpoint := findings.provenance.get("checkpoint"):
        blocks.append(f"Of {_plain(checkpoint)}.")
    blocks.append(_plain(_subtitle(findings)))
    if minded := [f"{s.title}: {warning}" for s in findings.sections for warning in s.warnings]:
        blocks += ["## What to mind", _bullets(minded)]
    if key := _key_figures(findings):
        head = ["measure", "figure", "value", "unit", "better"]
        rows = [
            [section.title, figure.name, _pm(figure), figure.unit, figure.better or ""]
            for section, figure in key
        ]
        blocks += ["## Key figures", _grid(head, rows)]
    for section in findings.sections:
        blocks += [f"## {_plain(section.title)}", _plain(section.meaning)]
        if section.warnings:
            blocks.append(_bullets([f"Mind: {warning}" for warning in section.warnings]))
        if section.figures:
            rows = [[f.name, _pm(f), f.unit, f.better or "", f.meaning] for f in section.figures]
            blocks.append(_grid(["figure", "value", "unit", "better", "what it is"], rows))
        for table in [*section.tables, *map(_thinned, section.curves)]:
            blocks += [f"### {_plain(table.title)}", _plain(table.meaning)]
            blocks.append(_grid(table.columns, [[_shown(cell) for cell in row] for row in table.rows]))
        for picture in section.pictures:
            blocks += [f"### {_plain(picture.title)}", _plain(picture.meaning)]
            blocks.append(f"![{_plain(picture.title)}](<pictures/{picture.file}>)")
    blocks += ["## Provenance", _bullets([f"{k}: {fact}" for k, fact in findings.provenance.items()])]
    blocks += ["The run's config:", "\n".join(f"    {line}" for line in _dump(findings.config).splitlines())]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _pm(figure: Figure) -> str:
    return " ± ".join(filter(None, _measured(figure)))


def _plain(text: str) -> str:
    """Return text in which Markdown finds no markup."""
    return re.sub(r"([\\`*_{}\[\]#|~!$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        [_plain(title) for title in head],
        ["---"] * len(head),
        *([_plain(c) for c in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ── HTML ────────────────────────────────────────────────────────────────────────────────────────────────


def _page(findings: Findings) -> str:
    style = "".join(
        importlib.resources.files("jebm.evaluate").joinpath(name).read_text(encoding="utf-8")
        for name in ("plot.css", "report.css")
    )
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    checkpoint = findings.provenance.get("checkpoint")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_e(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_e(_title(findings))}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            f"<header>\n<h1>{_e(_title(findings))}</h1>",
            f"<p><code>{_e(checkpoint)}</code></p>" if checkpoint else "",
            f"<p>{_e(_subtitle(findings))}</p>",
            _contents(findings),
            "</header>",
            "<main>",
            _summary(findings),
            *(_whole_section(section) for section in findings.sections),
            _provenance(findings),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _anchor(section: Section) -> str:
    return f"measure-{re.sub('[^a-z0-9]+', '-', section.name.lower())}"


def _better(figure: Figure) -> str:
    arrow = {"lower": "↓", "higher": "↑", None: ""}[figure.better]
    return f'{arrow} <span class="words">{figure.better} is better</span>' if figure.better else ""


def _contents(findings: Findings) -> str:
    links = [(_anchor(section), section.title) for section in findings.sections]
    links.append(("provenance", "Provenance"))
    items = "".join(f'<li><a href="#{anchor}">{_e(title)}</a></li>' for anchor, title in links)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _summary(findings: Findings) -> str:
    parts = ['<section id="summary"><h2>Summary</h2>']
    minded = [
        f'<li><a href="#{_anchor(section)}">{_e(section.title)}</a>: {_e(warning)}</li>'
        for section in findings.sections
        for warning in section.warnings
    ]
    if minded:
        parts.append(f'<div class="minded" role="note"><h3>What to mind</h3><ul>{"".join(minded)}</ul></div>')
    else:
        parts.append('<p class="soft">No measure has a warning.</p>')
    cards = []
    for section, figure in _key_figures(findings):
        value, error = _measured(figure)
        around = f" <small>± {_e(error)}</small>" if error else ""
        unit = f'<span class="unit">{_e(figure.unit)}</span> ' if figure.unit else ""
        cards.append(
            f'<li title="{_e(figure.meaning)}"><a href="#{_anchor(section)}">{_e(section.title)}</a>'
            f'<strong>{_e(value)}{around}</strong><div class="name">{_e(figure.name)}</div>'
            f'{unit}<span class="better">{_better(figure)}</span></li>'
        )
    return "\n".join([*parts, f'<ul class="cards">{"".join(cards)}</ul></section>'])


def _whole_section(section: Section) -> str:
    parts = [
        f'<section id="{_anchor(section)}"><h2>{_e(section.title)}</h2>',
        f'<p>{_e(section.meaning)} <span class="soft">Took {_duration(section.seconds)}.</span></p>',
    ]
    if section.warnings:
        lines = "".join(f"<li>{_e(warning)}</li>" for warning in section.warnings)
        parts.append(f'<div class="minded"><ul>{lines}</ul></div>')
    if section.figures:
        parts.append(_figures(section.figures))
    parts += [_table(table) for table in section.tables]
    parts += [
        f'<h3>{_e(curve.title)}</h3><p class="meaning">{_e(curve.meaning)}</p>{line_plot(curve)}'
        for curve in section.curves
    ]
    if section.pictures:
        parts.append(f'<div class="gallery">{"".join(map(_picture, section.pictures))}</div>')
    return "\n".join([*parts, "</section>"])


def _figures(figures: Sequence[Figure]) -> str:
    rows = ""
    for figure in figures:
        value, error = _measured(figure)
        rows += (
            f'<tr><th scope="row">{_e(figure.name)} <span class="meaning">{_e(figure.meaning)}</span></th>'
            f'<td class="n">{_e(value)}{f" ± {_e(error)}" if error else ""}</td><td>{_e(figure.unit)}</td>'
            f'<td class="better">{_better(figure)}</td></tr>'
        )
    head = (
        '<th scope="col">figure</th><th scope="col" class="n">value ± standard error</th>'
        '<th scope="col">unit</th><th scope="col"></th>'
    )
    return (
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _table(table: Table) -> str:
    kinds = [
        ' class="n"' if not any(isinstance(row[i], str) for row in table.rows if i < len(row)) else ""
        for i in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{kind}>{_e(title)}</th>' for kind, title in zip(kinds, table.columns, strict=True)
    )
    rows = ""
    for row in table.rows:
        cells = (f"<td{kind}>{_e(_shown(cell))}</td>" for kind, cell in zip(kinds, row, strict=False))
        rows += f"<tr>{''.join(cells)}</tr>"
    return (
        f'<h3>{_e(table.title)}</h3><p class="meaning">{_e(table.meaning)}</p>'
        f'<div class="scroll"><table class="wide">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _picture(picture: Picture) -> str:
    with Image.open(io.BytesIO(picture.png)) as image:
        width, height = image.size
    scale = max(1, min(3, _PICTURE_WIDTH // width))  # whole pixels, so that all are as wide as each other
    return (
        f'<figure><figcaption><h3>{_e(picture.title)}</h3><p class="meaning">{_e(picture.meaning)}</p>'
        f'</figcaption><img alt="{_e(picture.title)}" width="{scale * width}" height="{scale * height}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.png).decode()}"></figure>'
    )


_PICTURE_WIDTH = 640
"""The widest that a small picture is enlarged to."""


def _provenance(findings: Findings) -> str:
    facts = "".join(
        f'<tr><th scope="row">{_e(name)}</th><td><code>{_e(fact)}</code></td></tr>'
        for name, fact in findings.provenance.items()
    )
    return (
        '<section id="provenance"><h2>Provenance</h2><details open><summary>What the figures were made with'
        f'</summary><div class="scroll"><table class="facts"><tbody>{facts}</tbody></table></div></details>'
        f"<details><summary>The run's config</summary><pre><code>{_e(_dump(findings.config))}</code></pre>"
        "</details></section>"
    )
