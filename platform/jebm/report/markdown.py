"""Findings as Markdown: for a terminal, an email, a pull request."""

import html
import re
from collections.abc import Iterator, Sequence

from jebm.report.findings import Curve, Findings, Listing, Section, Table, duration, shown

__all__ = ["markdown"]

_MOST_ROWS = 11  # of a curve


def markdown(findings: Findings) -> str:
    """Return all findings as Markdown; pictures as links to the PNGs in `pictures/`."""
    blocks = [f"# {_plain(findings.title)}", *map(_plain, findings.lead)]
    if minded := [f"{s.title}: {warning}" for s in findings.sections for warning in s.warnings]:
        blocks += ["## What to mind", _bullets(minded)]
    for section in findings.sections:
        blocks += _section(section)
    if findings.provenance:
        blocks += ["## Provenance", _bullets([f"{k}: {fact}" for k, fact in findings.provenance.items()])]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _section(section: Section) -> Iterator[str]:
    took = "" if section.seconds is None else f" Took {duration(section.seconds)}."
    yield f"## {_plain(section.title)}"
    yield _plain(section.meaning + took)
    yield _bullets([f"Mind: {warning}" for warning in section.warnings])
    yield from map(_listing, section.listings)
    if section.figures:
        rows = [[f.name, shown(f), f.unit, f.better or "", f.meaning] for f in section.figures]
        yield _grid(["figure", "value", "unit", "better", "what it is"], rows)
    yield _bullets(section.notes)
    for table in [*section.tables, *map(_thinned, section.curves)]:
        yield f"### {_plain(table.title)}"
        yield _plain(table.meaning)
        yield _grid(table.columns, [[shown(cell) for cell in row] for row in table.rows])
    for drawing in section.drawings:
        yield f"### {_plain(drawing.title)}"
        yield f"{_plain(drawing.meaning)} (The plot is in the page.)"
    for picture in section.pictures:
        yield f"### {_plain(picture.title)}"
        yield _plain(picture.meaning)
        yield f"![{_plain(picture.title)}](<pictures/{picture.file}>)"


def _thinned(curve: Curve) -> Table:
    """Return a curve as a table of a few rows, including the first and the last."""
    count = min(_MOST_ROWS, len(curve.x))
    kept = sorted({round(index * (len(curve.x) - 1) / max(1, count - 1)) for index in range(count)})
    rows = tuple((curve.x[i], *(line[i] for line in curve.lines.values())) for i in kept)
    return Table(curve.title, (curve.x_name, *curve.lines), rows, f"{curve.y_name}. {curve.meaning}")


def _listing(listing: Listing) -> str:
    lines = "\n".join(f"    {line}" for line in listing.text.splitlines())
    return f"{_plain(listing.title)}\n\n{lines}"


def _plain(text: str) -> str:
    """Return text escaped so that Markdown finds no markup in it."""
    return re.sub(r"([\\`*_{}\[\]#|~!$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[_plain(title) for title in head], ["---"] * len(head)]
    lines += [[_plain(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
